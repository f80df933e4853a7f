"""A mixture's experts in 4 bits: bitsandbytes' own, a matrix at a time, from any files; copied to the bit."""

import json

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CPU
from tiny_families import FAMILIES, config_of, write_family
from transformers import AutoModelForCausalLM

from job.core.errors import DataError
from job.tune.model.base import load_base, quantised_files
from job.tune.model.config import empty_model, read_config, shape_of
from job.tune.model.experts import dequantised_experts, in_four_bits
from job.tune.model.four_bit import form_of
from job.tune.model.mixtures import experts_in, experts_modules, weights_of_experts

_LEFT = ("llama4_text", "doge")
"""Llama 4's experts transformers itself makes linear modules of; Doge's are rows of embeddings."""
MIXTURES = [name for name in FAMILIES if name not in _LEFT and experts_in(empty_model(config_of(name)))]
_SOME = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3", "olmoe")
each_mixture = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _SOME else pytest.mark.families) for name in MIXTURES]
)


@each_mixture
def test_each_expert_is_what_bitsandbytes_makes_of_its_matrix(name, tmp_path):
    folder = write_family(tmp_path / "base", name)
    base = load_base(folder, device=CPU, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = dict(experts_modules(whole))
    assert modules
    assert {path for path, module in base.named_modules() if in_four_bits(module)} == set(modules)
    for path, module in modules.items():
        held = in_four_bits(base.get_submodule(path))
        assert tuple(held) == weights_of_experts(module)
        for kind, weights in held.items():
            in_16_bits = getattr(module, kind).detach()
            values = dequantised_experts(base.get_submodule(path), kind, dtype=torch.float32)
            assert values.shape == in_16_bits.shape
            assert base.get_submodule(path).get_parameter(kind).shape == in_16_bits.shape
            for expert, matrix in enumerate(in_16_bits):
                rows = matrix.t().contiguous() if module.is_transposed else matrix
                packed, state = bnb.functional.quantize_4bit(
                    rows, blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                assert torch.equal(weights.packed[expert], packed.reshape(-1))
                assert torch.equal(weights.scales[expert], state.absmax)
                assert torch.equal(weights.outer_scales[expert], state.state2.absmax)
                assert torch.equal(weights.offsets[expert], state.offset)
                theirs = bnb.functional.dequantize_4bit(packed, state)
                assert torch.equal(values[expert].t() if module.is_transposed else values[expert], theirs)


def test_all_experts_are_in_4_bits_and_counted_as_what_they_stand_for(tmp_path):
    folder = write_family(tmp_path / "base", "qwen3_moe")
    base, shape = load_base(folder, device=CPU, dtype=torch.float32), shape_of(read_config(folder))
    in_experts = 2 * 4 * 64 * (2 * 64 + 64)
    assert shape.expert_parameters == experts_in(base) == in_experts
    assert shape.parameters == sum(p.numel() for p in empty_model(read_config(folder)).parameters())
    assert form_of(base).endswith(f"1 not (lm_head); {in_experts:,} parameters of experts in 4 bits")
    held = [weights for module in base.modules() for weights in in_four_bits(module).values()]
    assert sum(weights.packed.nbytes for weights in held) == in_experts // 2
    stand_ins = [p for p in base.parameters() if p.ndim == len(("expert", "out", "in"))]
    assert sum(p.untyped_storage().nbytes() for p in stand_ins) == 4 * len(stand_ins)
    assert all(bool(p.isinf().all()) for p in stand_ins)  # who computes with them past us sees it


@each_mixture
def test_a_copy_in_4_bits_holds_the_experts_to_the_bit(name, tmp_path):
    folder, copy = write_family(tmp_path / "base", name), tmp_path / "copy"
    base = load_base(folder, device=CPU, dtype=torch.float32)
    copy.mkdir()
    for file, content in quantised_files(base, folder):
        (copy / file).write_bytes(content())
    again = load_base(copy, device=CPU, dtype=torch.float32)
    before, after = base.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, again(input_ids=ids).logits)


def test_a_copy_of_other_experts_is_refused(tmp_path):
    """Whose bytes are as many: half as wide and twice as high."""
    folder, copy = write_family(tmp_path / "base", "qwen3_moe"), tmp_path / "copy"
    copy.mkdir()
    for file, content in quantised_files(load_base(folder, device=CPU, dtype=torch.float32), folder):
        (copy / file).write_bytes(content())
    state = "model.layers.1.mlp.experts.down_proj.quant_state.bitsandbytes__nf4"
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        if state in tensors:
            about = json.loads(bytes(tensors[state].tolist()))
            assert about["shape"] == [4, 64, 64]
            changed = json.dumps(about | {"shape": [4, 128, 32]}).encode()
            save_file(tensors | {state: torch.tensor([*changed], dtype=torch.uint8)}, file)
    with pytest.raises(DataError, match=r"layers.1.mlp.experts.down_proj: .* is of \[4, 128, 32\], not \[4, 64, 64\]"):
        load_base(copy, device=CPU, dtype=torch.float32)
