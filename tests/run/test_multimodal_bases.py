"""Multimodal bases through the whole job: their text decoder is trained, and its adapter is one of the whole model."""

import json
import shutil

import pytest
import torch
from job_process import call
from peft import PeftModel
from safetensors import safe_open
from tiny_wrappers import write_wrapper
from transformers import AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig

LEFT_OUT = "model.vision_tower (36,096 parameters), model.multi_modal_projector (2,080 parameters)"


def wrapper_with(tokenizer_of, folder, name="gemma3", **options):
    shutil.copytree(tokenizer_of, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    return write_wrapper(folder, name, **options)


@pytest.fixture
def multimodal(job, base):
    job.recipe["model"]["base"] = str(wrapper_with(base, job.folder / "own-base", most_bytes="60KB"))
    job.recipe["lora"]["targets"] = "all-linear"
    return job


def loss_of(report, adapter, base, rows):
    """Held-out loss, by transformers, bitsandbytes and PEFT alone."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    whole = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=nf4
    )
    for module in whole.modules():
        module.support_avx512bf16_for_cpu = False
    model, tokenizer = PeftModel.from_pretrained(whole, adapter).eval(), AutoTokenizer.from_pretrained(base)
    template, total, count = report["recipe"]["data"], 0.0, 0
    for row in rows:
        prompt = tokenizer(template["prompt"].format_map(row)).input_ids
        ids = torch.tensor([prompt + tokenizer(template["completion"].format_map(row)).input_ids[1:] + [2]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
        count += ids.shape[1] - len(prompt)
    return total / count


def test_the_decoder_is_trained_resumed_to_the_bit_and_proven_in_the_whole_model(multimodal):
    job = multimodal
    checked = job.call("check")
    assert checked.code == 0, checked.stdout
    said = "Gemma3ForConditionalGeneration is a model of more than text: its text decoder (gemma3_text) is trained; "
    assert said in " ".join(checked.stdout.split())
    assert "GB of it the text decoder's; bf16" in checked.stdout
    assert job.start("run", "--run-id", "whole").code == 0
    assert job.start("run", "--run-id", "cut", "--crash-at", "step.middle:6").code == -9
    assert job.start("run", "--run-id", "cut").code == 0

    whole, cut = (json.loads((job.store / f"runs/{name}/report.json").read_text()) for name in ("whole", "cut"))
    assert whole["model"]["architecture"] == "Gemma3ForConditionalGeneration (its decoder: Gemma3ForCausalLM)"
    assert whole["model"]["left_out"] == LEFT_OUT
    assert any(said in note and LEFT_OUT in note for note in whole["notes"])
    assert [whole["model"]["loaded_from"], cut["model"]["loaded_from"]] == ["weights", "copy in 4 bits"]
    for report in (whole, cut):
        assert report["adapter"]["proven_loss"] == report["adapter"]["reported_loss"]
    assert cut["curve"] == whole["curve"]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert cut["adapter"]["files"][file] == whole["adapter"]["files"][file]
    card = (job.store / "runs/whole/adapter/README.md").read_text()
    assert "base = AutoModelForImageTextToText.from_pretrained(" in card

    adapter = job.store / "runs/whole/adapter"
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        assert all(name.startswith("base_model.model.model.language_model.layers.") for name in file.keys())  # noqa: SIM118
    rows = [json.loads(line) for line in (job.data / "validation.jsonl").read_text().splitlines()]
    by_anybody = loss_of(whole, adapter, job.folder / "own-base", rows)
    assert by_anybody == pytest.approx(whole["adapter"]["reported_loss"], rel=2e-3)
    assert whole["sweet_spot"]["base_loss"] > 1.02 * by_anybody

    tried = call("try", f"file://{job.store}/runs/whole", "--prompt", "12 red hats\n", "--workdir", str(job.workdir))
    assert tried.code == 0, tried.stderr
    (answer,) = [each["tuned"] for each in whole["answers"] if each["prompt"] == "12 red hats\n"]
    assert answer.strip() in tried.stdout


def test_a_model_of_more_than_text_that_is_not_trained_is_refused_by_check_and_run(job, base):
    folder = shutil.copytree(base, job.folder / "own-base")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "paligemma"}
    (folder / "config.json").write_text(json.dumps(config))
    job.recipe["model"]["base"] = str(folder)
    for command in ("check", "plan", "run"):
        ended = job.call(command)
        assert ended.code == 64, ended.stdout
        assert "paligemma is a model of more than text, and of those this job trains" in ended.outcome["reason"]
