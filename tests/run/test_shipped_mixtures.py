"""The recipes that ship for mixtures of experts, on their bases' configs and the headers of their files."""

import json
from pathlib import Path

import pytest
import yaml
from job_process import Job
from run_material import make_base
from tiny_mxfp4 import SECTION
from transformers import CONFIG_MAPPING

from job.core.base.mxfp4 import form_with_experts
from job.core.base.promises import TensorHeader, form_in_files
from job.core.recipe.schema import LoraSection
from job.tune.model.adapter import refuse_targets
from job.tune.model.promises import hold_to_promises
from job.tune.rehearsal import rehearse

ROOT = Path(__file__).parents[2]
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": SECTION,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 201088,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
"""What of config.json on the hub says what the models are."""


def gpt_oss_tensors():
    """Names, dtypes and shapes of the files on the hub."""
    yield from (("model.embed_tokens.weight", "BF16", (201088, 2880)), ("lm_head.weight", "BF16", (201088, 2880)))
    yield "model.norm.weight", "BF16", (2880,)
    for layer in range(24):
        of = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{of}.{norm}.weight", "BF16", (2880,)
        for name, out, width in (("q", 4096, 2880), ("k", 512, 2880), ("v", 512, 2880), ("o", 2880, 4096)):
            yield f"{of}.self_attn.{name}_proj.weight", "BF16", (out, width)
            yield f"{of}.self_attn.{name}_proj.bias", "BF16", (out,)
        yield f"{of}.self_attn.sinks", "BF16", (64,)
        yield from ((f"{of}.mlp.router.weight", "BF16", (32, 2880)), (f"{of}.mlp.router.bias", "BF16", (32,)))
        for name, out in (("gate_up_proj", 5760), ("down_proj", 2880)):
            yield f"{of}.mlp.experts.{name}_blocks", "U8", (32, out, 90, 16)
            yield f"{of}.mlp.experts.{name}_scales", "U8", (32, out, 90)
            yield f"{of}.mlp.experts.{name}_bias", "BF16", (32, out)


def qwen3_tensors():
    """Names, dtypes and shapes of the files on the hub: a tensor for each matrix of each expert."""
    yield from (("model.embed_tokens.weight", "BF16", (151936, 2048)), ("lm_head.weight", "BF16", (151936, 2048)))
    yield "model.norm.weight", "BF16", (2048,)
    for layer in range(48):
        of = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{of}.{norm}.weight", "BF16", (2048,)
        for name, out, width in (("q", 4096, 2048), ("k", 512, 2048), ("v", 512, 2048), ("o", 2048, 4096)):
            yield f"{of}.self_attn.{name}_proj.weight", "BF16", (out, width)
        yield from ((f"{of}.self_attn.{name}_norm.weight", "BF16", (128,)) for name in "qk")
        yield f"{of}.mlp.gate.weight", "BF16", (128, 2048)
        for expert in range(128):
            for name, out, width in (("gate_proj", 768, 2048), ("up_proj", 768, 2048), ("down_proj", 2048, 768)):
                yield f"{of}.mlp.experts.{expert}.{name}.weight", "BF16", (out, width)


BASES = {
    "gpt-oss-20b": (GPT_OSS_20B, gpt_oss_tensors, 20.915, 13.76, "MXFP4 (48 tensors of experts), all else bf16"),
    "qwen3-30b-a3b": (QWEN3_30B_A3B, qwen3_tensors, 30.532, 61.06, "bf16"),
}


def headers_of(name):
    return {each: TensorHeader(dtype=dtype, shape=shape) for each, dtype, shape in BASES[name][1]()}


@pytest.fixture(params=BASES)
def shipped(request, tmp_path, warm):
    """Its name, and a job with its recipe on a base of its config, without weights."""
    base = make_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "config.json").write_text(json.dumps(BASES[request.param][0]), encoding="utf-8")
    job = Job(tmp_path / "job", base, warm)
    recipe = yaml.safe_load((ROOT / f"recipes/{request.param}.yaml").read_text(encoding="utf-8"))
    own = {"model": job.recipe["model"], "output": job.recipe["output"]}
    # The records are the tests' own, and their tokenizer has no chat template; that few make fewer steps.
    data = job.recipe["data"] | {"max_length": recipe["data"]["max_length"]}
    job.recipe = recipe | own | {"data": data, "train": recipe["train"] | {"warmup_steps": 0}}
    return request.param, job, base


def test_the_files_on_the_hub_are_what_the_config_promises(shipped):
    name, _, base = shipped
    *_, gigabytes, form = BASES[name]
    headers = headers_of(name)
    assert hold_to_promises(base, headers, source=name) is None
    assert (form_with_experts(headers) or form_in_files(headers, None)) == form
    assert sum(header.bytes for header in headers.values()) / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_a_shipped_mixture_is_planned_on_one_gpu(shipped):
    name, job, _ = shipped
    planned = job.start("plan", "--gpu", "h100", "--json")
    assert planned.code == 0, planned.stdout + planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["work"]["parameters"] / 1e9 == pytest.approx(BASES[name][2], abs=1e-3)
    (on_h100,) = plan["forecasts"]
    assert on_h100["fits"]
    longest = job.start("plan", "--gpu", "h100", "--json", "--set", "data.max_length=2048")
    least = json.loads(longest.stdout)["ask"]["gpu_memory_gib"]
    text = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8")
    assert f"by `plan` from {least} GiB, with examples of 2,048 tokens at most" in text
    said = " ".join(job.start("plan", "--gpu", "h100").stdout.split())
    assert "is a mixture of experts" in said
    assert "one document a row" not in said


@pytest.mark.parametrize("name", BASES)
def test_a_small_copy_of_a_shipped_mixture_passes_the_self_test_of_check(name):
    recipe = yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8"))
    config = CONFIG_MAPPING[BASES[name][0]["model_type"]](**BASES[name][0])
    said = rehearse(config, LoraSection.model_validate(recipe["lora"]))
    assert "one document a row" not in said
    assert "linear layers are PEFT's own" not in said


@pytest.mark.parametrize("name", BASES)
def test_what_a_shipped_recipe_says_of_its_adapter_is_so(name):
    """Millions of weights, on attention at its r and on the experts at r 4."""
    text = (ROOT / f"recipes/{name}.yaml").read_text(encoding="utf-8")
    config = CONFIG_MAPPING[BASES[name][0]["model_type"]](**BASES[name][0])
    lora = LoraSection.model_validate(yaml.safe_load(text)["lora"])
    on_experts = refuse_targets(config, LoraSection(r=4, targets="experts"))
    assert f"Attention: {refuse_targets(config, lora) / 1e6:.0f} million weights at r {lora.r}." in text
    assert f"[all-linear, experts] with r 4 gives each expert factors: {on_experts / 1e6:.0f} million" in text
