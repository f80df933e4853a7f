"""Experts merged into what training has made of them: each in 4 bits, and those that are published in MXFP4."""

import re

import pytest
import torch
from layouts import bnb4_base, config_with, tensors_of
from merged import adapted, lora, merge, save_adapter
from safetensors.torch import save_file
from test_merging import MIXTURES, each_of, weights_of
from tiny import CPU, LAYERS
from tiny_families import write_family
from tiny_mxfp4 import write_mxfp4
from trained_on import trained_on
from transformers import AutoModelForCausalLM

from job.core.errors import DataError
from job.tune.device.compute_dtype import compute_dtype
from job.tune.merging.layered import origins_of
from job.tune.model.base import load_base, quantised_files
from job.tune.model.experts import dequantised_experts, in_four_bits
from job.tune.model.stored.tensor_files import StoredTensor

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IN_FOUR_BITS = {"mixtral", "qwen3_moe", "qwen3_5_moe_text", "gpt_oss"}
"""Of others experts may stay in 16 bits in training: then they do here."""


@pytest.mark.parametrize("family", each_of(*MIXTURES))
def test_onto_quantised_each_expert_is_the_one_that_was_trained_on(family, tmp_path):
    """However files hold them: what is quantised is the matrix that the model multiplies by."""
    base = write_family(tmp_path / "base", family)
    held = trained_on(base, tmp_path / "trained-on")
    adapter = save_adapter(adapted(base, lora(["q_proj"], target_parameters=EXPERTS)), tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged", onto="quantised")
    merge(tmp_path / "trained-on", adapter, tmp_path / "wanted")

    found, wanted = weights_of(tmp_path / "merged"), weights_of(tmp_path / "wanted")
    assert held == 2 * LAYERS or family not in IN_FOUR_BITS
    for name, value in wanted.items():
        assert torch.equal(found[name], value.bfloat16().float()), name
    assert {n: t.shape for n, t in tensors_of(tmp_path / "merged").items()} == {
        n: t.shape for n, t in tensors_of(base).items()
    }


def test_experts_that_training_puts_into_4_bits_go_through_them_in_a_base_whose_layers_are_in_them(tmp_path):
    """As others publish mixtures: bitsandbytes leaves experts in 16 bits."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    base = bnb4_base(write_family(tmp_path / "plain", "qwen3_moe"), tmp_path / "base", **options)
    quantised, dtype = load_base(base, device=CPU, dtype=compute_dtype(CPU)), compute_dtype(CPU)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    adapter = save_adapter(adapted(tmp_path / "plain", lora(["q_proj"])), tmp_path / "adapter")
    merged = {}
    for onto in ("quantised", "weights"):
        merge(base, adapter, tmp_path / onto, onto=onto)
        config_with(tmp_path / onto, quantization_config=None)
        merged[onto] = weights_of(tmp_path / onto)

    checked = 0
    for path, module in quantised.named_modules():
        for name in in_four_bits(module):
            values = dequantised_experts(module, name, dtype=dtype)
            assert torch.equal(merged["quantised"][f"{path}.{name}"], values.bfloat16().float())
            assert torch.equal(merged["weights"][f"{path}.{name}"], plain.get_submodule(path).get_parameter(name))
            checked += 1
    assert checked == 2 * LAYERS
    linear = [name for name in merged["weights"] if re.search(r"self_attn\.._proj", name)]
    assert linear
    assert all(torch.equal(merged["weights"][name], merged["quantised"][name]) for name in linear)


@pytest.mark.parametrize("onto", ["weights", "quantised"])
@pytest.mark.parametrize("targets", [EXPERTS, None], ids=["experts", "attention alone"])
def test_experts_in_mxfp4_are_merged_as_those_of_the_decoded_base(onto, targets, tmp_path):
    base = write_mxfp4(tmp_path / "base", decoded=tmp_path / "decoded")
    adapter = save_adapter(
        adapted(tmp_path / "decoded", lora(["q_proj"], target_parameters=targets)), tmp_path / "adapter"
    )
    prepared = merge(base, adapter, tmp_path / "merged", onto=onto)
    merge(tmp_path / "decoded", adapter, tmp_path / "wanted", onto=onto)

    found, wanted = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "wanted")
    assert prepared.weights.dtype == "BF16"
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    changed = [name for name, value in tensors_of(tmp_path / "decoded").items() if not torch.equal(found[name], value)]
    assert any("experts" in name for name in changed) == (targets is not None or onto == "quantised")


@pytest.mark.parametrize("onto", ["weights", "quantised"])
def test_of_a_stack_one_expert_is_read_and_decoded_at_a_time(onto, tmp_path, monkeypatch):
    base = write_mxfp4(tmp_path / "base", decoded=tmp_path / "decoded")
    adapter = save_adapter(adapted(tmp_path / "decoded", lora([], target_parameters=EXPERTS)), tmp_path / "adapter")
    read, sizes = StoredTensor.__getitem__, []

    def noted(self, index):
        part = read(self, index)
        if self.name.endswith(("_blocks", "_scales")):
            sizes.append(part.shape[0])
        return part

    monkeypatch.setattr(StoredTensor, "__getitem__", noted)
    merge(base, adapter, tmp_path / "merged", onto=onto)
    assert {*sizes} == {1}
    assert len(sizes) == 2 * 2 * 2 * 4  # layers, matrices, blocks and scales, experts


def test_the_proof_reads_what_is_in_mxfp4_too(tmp_path):
    base = write_mxfp4(tmp_path / "base", decoded=tmp_path / "decoded")
    ours, plain = (origins_of(folder, not_finite=set()) for folder in (base, tmp_path / "decoded"))
    assert {*ours.parameters()} == {*plain.parameters()}
    assert all(torch.equal(ours.parameter(name), plain.parameter(name)) for name in ours.parameters())


def test_a_scale_that_stands_for_no_number_is_named(tmp_path):
    base = write_mxfp4(tmp_path / "base", decoded=tmp_path / "decoded")
    name = "model.layers.0.mlp.experts.down_proj_scales"
    tensors = tensors_of(base)
    tensors[name][2, 3, 1] = 255
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(adapted(tmp_path / "decoded", lora(["q_proj"])), tmp_path / "adapter")
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.experts\.down_proj: not every number is finite"):
        merge(base, adapter, tmp_path / "merged")


def test_a_copy_that_this_job_has_made_of_a_mixture_is_refused(tmp_path):
    base, copy = write_family(tmp_path / "base", "qwen3_moe"), tmp_path / "copy"
    copy.mkdir()
    for file, content in quantised_files(load_base(base, device=CPU, dtype=torch.float32), base):
        (copy / file).write_bytes(content())
    adapter = save_adapter(adapted(base, lora(["q_proj"])), tmp_path / "adapter")

    with pytest.raises(DataError, match=r"experts\.\w+: the base is a copy that this job has made"):
        merge(copy, adapter, tmp_path / "merged", onto="quantised")
    assert not [*tmp_path.glob("merged/*.safetensors")]
