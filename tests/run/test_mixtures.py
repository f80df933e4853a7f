"""A mixture of experts through the whole job: checked, planned, trained, cut off and resumed to the bit, proven."""

import json
import shutil

import pytest
from tiny_families import write_family
from transformers import AutoConfig

EXPERTS = 2 * 4 * 64 * (2 * 64 + 64)


@pytest.fixture
def mixture(job, base):
    folder = job.folder / "own-base"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    job.recipe["model"]["base"] = str(write_family(folder, "qwen3_moe"))
    job.recipe["lora"] = {"r": 4, "alpha": 8, "targets": ["all-linear", "experts"]}
    return job


def test_a_mixture_is_trained_in_4_bits_with_adapters_on_its_experts_and_proven(mixture):
    job = mixture
    checked = job.call("check")
    assert checked.code == 0, checked.stdout
    said = f"qwen3_moe is a mixture of experts: {EXPERTS:,} of its "
    in_one_line = " ".join(checked.stdout.split())
    assert said in in_one_line
    assert "they get no adapter, and no load-balancing loss is added" in in_one_line
    planned = job.call("plan", "--json")
    assert planned.code == 0, planned.stdout
    assert job.start("run", "--run-id", "whole").code == 0
    assert job.start("run", "--run-id", "cut", "--crash-at", "step.middle:6").code == -9
    assert job.start("run", "--run-id", "cut").code == 0

    whole, cut = (json.loads((job.store / f"runs/{name}/report.json").read_text()) for name in ("whole", "cut"))
    assert [whole["model"]["loaded_from"], cut["model"]["loaded_from"]] == ["weights", "copy in 4 bits"]
    assert f"{EXPERTS:,} parameters of experts in 4 bits" in whole["model"]["quantisation"]
    for report in (whole, cut):
        assert any(said in note for note in report["notes"])
        assert report["adapter"]["proven_loss"] == report["adapter"]["reported_loss"]
    assert cut["curve"] == whole["curve"]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert cut["adapter"]["files"][file] == whole["adapter"]["files"][file]
    assert whole["sweet_spot"]["base_loss"] > whole["adapter"]["reported_loss"]
    config = json.loads((job.store / "runs/whole/adapter/adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    document = json.loads(planned.stdout)
    assert document["work"]["parameters"] == whole["model"]["total_parameters"] - whole["model"]["trainable_parameters"]


@pytest.mark.parametrize(
    ("kind", "placement"), [("qwen3_moe", "sharded"), ("gpt_oss", "sharded"), ("qwen2_moe", "replicated")]
)
def test_a_mixture_that_fits_no_single_gpu_is_planned_as_a_run_places_it(mixture, kind, placement):
    """By its configuration alone: Qwen3-30B-A3B, one with sinks, and one whose rows hold one document."""
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 48}
    inner = {"intermediate_size": 768} if kind == "gpt_oss" else {"moe_intermediate_size": 768}
    name = "num_local_experts" if kind == "gpt_oss" else "num_experts"
    config = AutoConfig.for_model(kind, **sizes, **inner, **{name: 128}, num_experts_per_tok=8, head_dim=128)
    folder = mixture.folder / "own-base"
    (folder / "model.safetensors").unlink()
    config.save_pretrained(folder)
    mixture.recipe["lora"]["targets"] = ["q_proj", "v_proj"]
    ended = mixture.call("plan", "--json", "--gpu-memory", "15", "--gpus", "2")
    assert ended.code == 0, ended.stdout + ended.stderr
    (found,) = json.loads(ended.stdout)["forecasts"]

    assert (found["placement"], found["fits"]) == (placement, placement == "sharded")
    said = "each GPU holds the whole base, which cannot be sharded: qwen2_moe trains one document a row"
    text = " ".join(mixture.call("plan", "--gpu-memory", "15", "--gpus", "2").stdout.split())
    assert (said in text) == (placement == "replicated")
    assert said not in " ".join(mixture.call("plan", "--gpu-memory", "15").stdout.split())


def test_dropout_before_experts_is_refused_by_the_recipe(mixture):
    mixture.recipe["lora"]["dropout"] = 0.1
    ended = mixture.call("check")
    assert ended.code == 64
    assert "PEFT has no dropout before the adapters of experts" in ended.outcome["reason"]
