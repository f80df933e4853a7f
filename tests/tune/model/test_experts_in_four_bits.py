"""A mixture's experts in 4 bits: read and quantised one at a time, counted, and copied to the bit."""

import json
from itertools import groupby

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CPU
from tiny_families import config_of, write_family

from job.core.errors import DataError, UsageError
from job.core.recipe.schema import LoraSection
from job.tune.model import experts
from job.tune.model.adapter import refuse_targets
from job.tune.model.base import load_base, quantised_files
from job.tune.model.config import empty_model, read_config, shape_of
from job.tune.model.experts import in_four_bits
from job.tune.model.four_bit import form_of
from job.tune.model.mixtures import experts_in
from job.tune.model.stored.tensor_files import StoredTensor


def test_all_experts_are_in_4_bits_and_counted_as_what_they_stand_for(tmp_path):
    folder = write_family(tmp_path / "base", "qwen3_moe")
    base, shape = load_base(folder, device=CPU, dtype=torch.float32), shape_of(read_config(folder))
    in_experts = 2 * 4 * 64 * (2 * 64 + 64)
    assert shape.experts.parameters == experts_in(base) == in_experts
    assert shape.parameters == sum(p.numel() for p in empty_model(read_config(folder)).parameters())
    assert form_of(base).endswith(f"1 not (lm_head); {in_experts:,} parameters of experts in 4 bits")
    held = [weights for module in base.modules() for weights in in_four_bits(module).values()]
    assert sum(weights.packed.nbytes for weights in held) == in_experts // 2
    stand_ins = [p for p in base.parameters() if p.ndim == len(("expert", "out", "in"))]
    assert sum(p.untyped_storage().nbytes() for p in stand_ins) == 4 * len(stand_ins)
    assert all(bool(p.isinf().all()) for p in stand_ins)  # who computes with them past us sees it


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
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


@pytest.mark.parametrize(("name", "at_once"), [("qwen3_moe", 2), ("gpt_oss", 1)])
def test_an_expert_is_quantised_before_the_next_one_is_read(name, at_once, tmp_path, monkeypatch):
    """Of files with a tensor for each expert's gate and up, and of files that hold all experts in one tensor."""
    folder, events = write_family(tmp_path / "base", name), []
    read, quantise = StoredTensor.__getitem__, experts.quantised

    def noted(self, index):
        part = read(self, index)
        if ".experts." in self.name and not self.name.endswith("bias"):
            events.append(part.numel())
        return part

    monkeypatch.setattr(StoredTensor, "__getitem__", noted)
    monkeypatch.setattr(experts, "quantised", lambda matrix: (events.append("quantised"), quantise(matrix))[1])
    load_base(folder, device=CPU, dtype=torch.float32)
    runs = [[*run] for is_read, run in groupby(events, key=lambda event: event != "quantised") if is_read]
    assert len(runs) == events.count("quantised") == 2 * 2 * 4
    assert max(map(len, runs)) == at_once
    width = read_config(folder).hidden_size
    inner = getattr(read_config(folder), "moe_intermediate_size", read_config(folder).intermediate_size)
    assert max(map(sum, runs)) == 2 * inner * width  # one expert's first matrix


def test_a_number_in_an_expert_that_is_not_finite_is_named(tmp_path):
    folder = write_family(tmp_path / "base", "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[name][5, 7] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"NaN or infinity in {name}, in 1 of all tensors"):
        load_base(folder, device=CPU, dtype=torch.float32)


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


@pytest.mark.parametrize(
    ("family", "name", "why"),
    [
        ("mixtral", "gate", "gate of MixtralForCausalLM chooses or weighs experts, and routers stay as they are"),
        ("gpt_oss", "router", "router of GptOssForCausalLM chooses or weighs experts"),
        ("qwen3_5_moe_text", "shared_expert_gate", "shared_expert_gate of Qwen3_5MoeForCausalLM chooses or weighs"),
        ("qwen3_moe", "gate_proj", "in Qwen3MoeForCausalLM gate_proj can only be the experts', .* write `experts`"),
        ("mixtral", "experts.gate_up_proj", "in MixtralForCausalLM experts.gate_up_proj can only be the experts'"),
        ("llama", "gate", "gate: no linear module of LlamaForCausalLM"),
    ],
)
def test_routers_and_experts_by_their_weights_names_are_no_targets(family, name, why):
    with pytest.raises(UsageError, match=why):
        refuse_targets(config_of(family), LoraSection(targets=("q_proj", name)))
