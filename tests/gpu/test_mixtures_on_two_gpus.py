"""A mixture of experts on two GPUs of one host, whole on each and shared between them; elsewhere these are skipped.

python -m pytest tests/gpu/test_mixtures_on_two_gpus.py -s -rs
"""

import pytest
import torch
from run_material import make_base
from test_many_gpus import CLOSE, SHARDED, carried, job_in
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs and a torch with CUDA")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Sixteen experts, five layers deep, on the tokenizer of the tiny base."""
    folder = make_base(tmp_path_factory.mktemp("mixture"))
    config = CONFIG_MAPPING["qwen3_moe"](
        vocab_size=128,
        hidden_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=192,
        num_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def on_experts(folder, base):
    job = job_in(folder, base)
    job.recipe["lora"] = {"r": 4, "alpha": 8, "targets": ["all-linear", "experts"]}
    return job


def test_a_mixture_on_two_gpus_has_the_losses_of_one(tmp_path, mixture):
    _, one = carried(on_experts(tmp_path / "one", mixture), 1, "auto")
    _, two = carried(on_experts(tmp_path / "two", mixture), 2, "auto")

    assert two["evaluations"][0]["loss"] == pytest.approx(one["evaluations"][0]["loss"], rel=1e-6)
    assert two["curve"]["loss"] == pytest.approx(one["curve"]["loss"], rel=2 * CLOSE)
    assert two["throughput"]["ranks"] == 2


def test_a_mixture_that_is_sharded_over_two_gpus_has_the_bits_of_two_that_each_hold_it(tmp_path, mixture):
    _, whole = carried(on_experts(tmp_path / "replicated", mixture), 2, "auto")
    ended, sharded = carried(on_experts(tmp_path / "sharded", mixture), 2, "auto", *SHARDED)

    assert ended.named("placement")[0]["placement"] == "sharded"
    for key in ("curve", "evaluations", "answers", "sweet_spot"):
        assert sharded[key] == whole[key], key
    files = [{**each["adapter"]["files"], "README.md": None} for each in (sharded, whole)]
    assert files[0] == files[1]
    shards = ended.named("shards")[0]  # and again for the proof
    # A part of five layers and two of them, attention and routers with their experts; not the stand-ins' size.
    experts = 5 * 16 * 3 * 256 * 192 * (1 / 2 + 1 / 64)
    assert experts * (1 / 2 + 2 / 5) < shards["bytes"] < 2 * experts
