"""gpt-oss as it is published, experts in MXFP4, through the whole job: as its decoded base would be, to the bit."""

import json
import shutil

import pytest
import torch
from tiny_mxfp4 import write_mxfp4
from transformers import AutoTokenizer

EXPERTS = 2 * 4 * 64 * (2 * 128 + 128)
FORM = "MXFP4 (4 tensors of experts), all else bf16"


@pytest.fixture
def gpt_oss(job, base):
    """A job on the published base; beside it stands the decoded one."""
    folder = job.folder / "own-base"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    write_mxfp4(folder, decoded=job.folder / "decoded")
    shutil.copytree(
        folder,
        job.folder / "decoded",
        ignore=shutil.ignore_patterns("*.safetensors", "config.json"),
        dirs_exist_ok=True,
    )
    job.recipe["model"]["base"] = str(folder)
    job.recipe["lora"] = {"r": 4, "alpha": 8, "targets": ["all-linear", "experts"]}
    return job


def loss_by_the_card(job, run):
    """With the base and the adapter loaded by the lines in the adapter's README; experts are in bf16 there."""
    adapter = job.store / f"runs/{run}/adapter"
    code = (adapter / "README.md").read_text().split("```python")[1].split("```")[0]
    code = code.replace("path/to/base", str(job.folder / "own-base")).replace("path/to/adapter", str(adapter))
    loaded = {}
    exec(compile(code, "README.md", "exec"), loaded)
    model, tokenizer = loaded["model"].eval(), AutoTokenizer.from_pretrained(job.folder / "own-base")
    losses = []
    for line in (job.data / "validation.jsonl").read_text().splitlines():
        prompt, completion = (
            job.recipe["data"][part].format_map(json.loads(line)) for part in ("prompt", "completion")
        )
        given = tokenizer(prompt).input_ids
        ids = torch.tensor([given + tokenizer(completion).input_ids[1:] + [2]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(given) - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(given) :], reduction="none"))
    return float(torch.cat(losses).mean())


def report_of(job, run):
    return json.loads((job.store / f"runs/{run}/report.json").read_text())


def test_gpt_oss_is_checked_trained_cut_off_resumed_and_proven(gpt_oss):
    job = gpt_oss
    checked = job.call("check")
    assert checked.code == 0, checked.stdout
    in_one_line = " ".join(checked.stdout.split())
    assert FORM in in_one_line
    assert f"gpt_oss is a mixture of experts: {EXPERTS:,} of its " in in_one_line
    assert "gpt_oss: experts are published in MXFP4; each is decoded exactly, and quantised once more" in in_one_line
    assert "one document a row" not in in_one_line
    planned = job.call("plan", "--json")
    assert planned.code == 0, planned.stdout

    assert job.start("run", "--run-id", "whole").code == 0
    assert job.start("run", "--run-id", "cut", "--crash-at", "step.middle:6").code == -9
    assert job.start("run", "--run-id", "cut").code == 0
    whole, cut = report_of(job, "whole"), report_of(job, "cut")
    assert [whole["model"]["loaded_from"], cut["model"]["loaded_from"]] == ["weights", "copy in 4 bits"]
    assert f"{EXPERTS:,} parameters of experts in 4 bits" in whole["model"]["quantisation"]
    assert cut["curve"] == whole["curve"]
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert cut["adapter"]["files"][file] == whole["adapter"]["files"][file]
    for report in (whole, cut):
        assert any("experts are published in MXFP4" in note for note in report["notes"])
        assert report["adapter"]["proven_loss"] == report["adapter"]["reported_loss"]
    assert whole["sweet_spot"]["base_loss"] > whole["adapter"]["reported_loss"]
    as_the_card_says = loss_by_the_card(job, "cut")
    assert as_the_card_says == pytest.approx(whole["adapter"]["reported_loss"], rel=0.05)
    document = json.loads(planned.stdout)
    assert document["work"]["parameters"] == whole["model"]["total_parameters"] - whole["model"]["trainable_parameters"]

    job.recipe["model"]["base"] = str(job.folder / "decoded")
    assert job.start("run", "--run-id", "decoded").code == 0
    decoded = report_of(job, "decoded")
    assert decoded["curve"] == whole["curve"]
    assert not any("MXFP4" in note for note in decoded["notes"])
    name = "adapter_model.safetensors"
    assert decoded["adapter"]["files"][name] == whole["adapter"]["files"][name]
