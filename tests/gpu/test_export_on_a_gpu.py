"""An export on a real GPU: proved there, with layers that stay where there is room, and little of the host's memory.

python -m pytest tests/gpu -s -rs
"""

import sys
from pathlib import Path

import pytest
import torch

from job.core.reports.export import Export

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tune" / "merging"))
from job_process import Job, call
from merged import adapted, lora, merge, save_adapter
from run_material import make_base
from test_merging import DENSE, MIXTURES
from tiny import config_of, write_base
from tiny_families import write_family
from transformers import AutoModelForCausalLM

from job.tune.merging.layered import Layered
from job.tune.merging.preparing import prepare_merge
from job.tune.model.base import load_base
from job.tune.model.config import read_config
from job.tune.model.experts import dequantised_experts, in_four_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA")


@pytest.mark.parametrize("onto", ["weights", "quantised"])
def test_a_run_of_this_gpu_is_exported_and_proved_on_it(onto, tmp_path):
    job = Job(tmp_path, make_base(tmp_path / "base"))
    assert call(*job.command("run")[2:], "--device", "cuda").code == 0
    words = ("--workdir", str(job.workdir), "--device", "cuda", "--onto", onto)
    ended = call("export", f"file://{job.only_run()}", "--to", str(tmp_path / "merged"), *words)

    assert ended.code == 0, ended.stdout[-2000:]
    losses = Export.model_validate_json((tmp_path / "merged" / "export.json").read_text()).losses
    compared = losses.unmerged if onto == "weights" else losses.reported
    assert losses.merged == pytest.approx(compared, rel=5e-3)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_what_goes_through_4_bits_here_is_what_was_trained_on_here(tmp_path):
    """To the bit: the same kind of device quantises."""
    base = write_base(tmp_path / "base", config_of("llama"))
    cuda = torch.device("cuda", 0)
    model = adapted(base, lora(["v_proj"]))
    adapter = save_adapter(model, tmp_path / "adapter")
    names = (adapter / "adapter_model.safetensors", adapter / "adapter_config.json")
    (tmp_path / "merged").mkdir()
    for name, make in prepare_merge(base, *names, onto="quantised", device=cuda).weights.files():
        (tmp_path / "merged" / name).write_bytes(b"".join(make()))
    (tmp_path / "merged" / "config.json").write_bytes((base / "config.json").read_bytes())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()

    from bitsandbytes.functional import dequantize_4bit

    trained_on = load_base(base, device=cuda, dtype=torch.bfloat16)
    checked = 0
    for name, module in trained_on.named_modules():
        if hasattr(getattr(module, "weight", None), "quant_state") and "v_proj" not in name:
            values = dequantize_4bit(module.weight.data, module.weight.quant_state).float().cpu()
            assert torch.equal(found[f"{name}.weight"], values), name
            checked += 1
    assert checked == 12


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_that_go_through_4_bits_here_are_those_that_were_trained_on_here(family, tmp_path):
    base, cuda = write_family(tmp_path / "base", family), torch.device("cuda", 0)
    adapter = save_adapter(adapted(base, lora(["q_proj"])), tmp_path / "adapter")
    names = (adapter / "adapter_model.safetensors", adapter / "adapter_config.json")
    (tmp_path / "merged").mkdir()
    for name, make in prepare_merge(base, *names, onto="quantised", device=cuda).weights.files():
        (tmp_path / "merged" / name).write_bytes(b"".join(make()))
    (tmp_path / "merged" / "config.json").write_bytes((base / "config.json").read_bytes())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()

    checked = 0
    for path, module in load_base(base, device=cuda, dtype=torch.bfloat16).named_modules():
        for name in in_four_bits(module):
            values = dequantised_experts(module, name, dtype=torch.bfloat16).float().cpu()
            assert torch.equal(found[f"{path}.{name}"], values)
            checked += 1
    assert checked == 4


@pytest.mark.parametrize("room", [0, 10**9])
@pytest.mark.parametrize("family", [*DENSE[:8], *MIXTURES[:4]])
def test_layers_stay_where_there_is_room_and_compute_the_same(family, room, tmp_path, monkeypatch):
    """`room`: one part in so many of the GPU's memory must be free, or none need be."""
    monkeypatch.setattr("job.tune.merging.layered._ROOM", room)
    base, cuda = write_family(tmp_path / "base", family), torch.device("cuda", 0)
    kind = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    found = Layered(read_config(base), device=cuda, dtype=torch.float32)
    found.read_from(base, not_finite=set())
    ids = torch.arange(3, 19, device=cuda)[None]
    with torch.no_grad():
        wanted = kind.to(cuda).eval()(input_ids=ids, use_cache=False).logits
        for _ in range(2):
            assert torch.allclose(found.model(input_ids=ids, use_cache=False).logits, wanted, atol=1e-4, rtol=1e-3)
    assert any(parameter.is_meta for parameter in found.model.parameters()) == (room == 0)


def test_merged_weights_do_not_depend_on_the_device(tmp_path):
    """They are added up on the host."""
    base = write_base(tmp_path / "base", config_of("llama"))
    adapter = save_adapter(adapted(base, lora()), tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    names = (adapter / "adapter_model.safetensors", adapter / "adapter_config.json")
    for name, make in prepare_merge(base, *names, onto="weights", device=torch.device("cuda", 0)).weights.files():
        assert b"".join(make()) == (tmp_path / "merged" / name).read_bytes()
