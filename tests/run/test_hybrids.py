"""A recurrent hybrid through the whole job: planned, trained in padded rows, cut off and resumed to the bit, proven."""

import json

import pytest
from run_material import letters_as_tokens
from test_multimodal_bases import loss_of, wrapper_with


@pytest.fixture
def hybrid(job):
    """Qwen 3.5 as it is published: a model of more than text, with a tokenizer of bytes."""
    tokenizer = letters_as_tokens(job.folder / "tokenizer")
    job.recipe["model"]["base"] = str(wrapper_with(tokenizer, job.folder / "own-base", "qwen3_5"))
    job.recipe["lora"] = {"r": 4, "alpha": 8, "targets": "all-linear"}
    return job


def test_a_hybrid_is_trained_in_padded_rows_resumed_to_the_bit_and_opened_by_peft(hybrid):
    job = hybrid
    checked = job.call("check")
    assert checked.code == 0, checked.stdout
    said = "qwen3_5_text trains one document a row, rows of like lengths padded together"
    across = "qwen3_5_text: layer 0 hands something on from token to token beside attention"
    in_one_line = " ".join(checked.stdout.split())
    assert said in in_one_line
    assert across in in_one_line
    planned = job.call("plan", "--json")
    assert planned.code == 0, planned.stdout
    work = json.loads(planned.stdout)["work"]
    assert work["document_rows"] == "padded"
    assert work["tokens"] > 15 * work["steps"] * work["batch_size"]  # documents of several chunks and lengths
    assert "document rows padded" in " ".join(job.call("plan").stdout.split())
    assert job.start("run", "--run-id", "whole").code == 0
    assert job.start("run", "--run-id", "cut", "--crash-at", "step.middle:6").code == -9
    assert job.start("run", "--run-id", "cut").code == 0

    whole, cut = (json.loads((job.store / f"runs/{name}/report.json").read_text()) for name in ("whole", "cut"))
    for report in (whole, cut):
        assert report["plan"]["document_rows"] == "padded"
        assert "one document a row, rows of like lengths padded together" in report["plan"]["engine_reason"]
        assert any(said in note for note in report["notes"])
        assert report["adapter"]["proven_loss"] == report["adapter"]["reported_loss"]
    assert cut["curve"] == whole["curve"]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert cut["adapter"]["files"][file] == whole["adapter"]["files"][file]

    rows = [json.loads(line) for line in (job.data / "validation.jsonl").read_text().splitlines()]
    by_anybody = loss_of(whole, job.store / "runs/whole/adapter", job.folder / "own-base", rows)
    assert by_anybody == pytest.approx(whole["adapter"]["reported_loss"], rel=5e-3)
    assert whole["sweet_spot"]["base_loss"] > 1.02 * by_anybody


def test_a_run_in_packed_rows_says_so(job):
    assert job.start("run", "--run-id", "packed").code == 0
    report = json.loads((job.store / "runs/packed/report.json").read_text())
    assert report["plan"]["document_rows"] == "packed"
