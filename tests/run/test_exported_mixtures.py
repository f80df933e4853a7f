"""Mixtures as models of their own: trained with adapters on their experts, merged, proved, and read by transformers."""

import json
import shutil

import pytest
import torch
from job_process import records
from peft import PeftModel
from test_exported_run import exported, loss_of
from tiny_families import write_family
from tiny_mxfp4 import write_mxfp4
from trained_on import trained_on
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.core.reports import export as exports
from job.core.reports.export import Export
from job.tune.device import compute_dtype


@pytest.fixture
def mixture(job, base):
    """A job, and what makes its base: its experts one by one, or all in MXFP4; and that base decoded."""

    def on(write):
        own = shutil.copytree(
            base, job.folder / "own-base", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
        )
        decoded = job.folder / "decoded" if write is write_mxfp4 else own
        job.recipe["model"]["base"] = str(write(own) if decoded == own else write(own, decoded=decoded))
        job.recipe["lora"] = {"r": 4, "alpha": 8, "targets": ["all-linear", "experts"]}
        job.recipe["train"]["steps"] = 18
        job.recipe["evaluate"]["every_steps"] = job.recipe["checkpoint"]["every_steps"] = 6
        return job, decoded

    return on


def in_bf16(folder):
    return write_family(folder, "qwen3_moe")


def in_fp32(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("write", [in_bf16, write_mxfp4])
def test_a_mixture_is_exported_onto_its_weights_and_onto_what_was_trained_on(mixture, write, tmp_path, monkeypatch):
    """Each weight is PEFT's own sum, rounded once, and each loss transformers' own."""
    # A random base loses more to 4 bits than a few steps gain; and once weights are rounded, a token that stood between
    # two experts goes to the other one: a single one of these 96 moves the loss over 18 target tokens by up to 2 %.
    monkeypatch.setattr(exports, "QUANTISATION", 1.0)
    monkeypatch.setattr(exports, "ROUNDING", 0.05)
    # Computing in bf16 moves tokens as well: then no two programs have the same loss.
    monkeypatch.setattr(compute_dtype, "processor_multiplies_bf16", lambda: False)
    job, decoded = mixture(write)
    ended = job.call("run")
    assert ended.code == 0, ended.stdout
    report = job.report()
    assert "parameters of experts in 4 bits; fp32 compute" in report["model"]["quantisation"]
    assert report["adapter"]["reported_loss"] < report["sweet_spot"]["base_loss"]
    assert trained_on(job.folder / "own-base", job.folder / "trained-on", decoded=decoded) == 4
    for onto, base in (("weights", decoded), ("quantised", job.folder / "trained-on")):
        ended = exported(job, tmp_path / onto, "--onto", onto)
        assert ended.code == 0, ended.stdout
        found = Export.model_validate_json((tmp_path / onto / "export.json").read_text())
        assert found.quantised_base == (write is write_mxfp4)
        assert "quantization_config" not in json.loads((tmp_path / onto / "config.json").read_text())
        merged, loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / onto, dtype=torch.float32, output_loading_info=True
        )
        assert not any(loaded[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))

        data, tokenizer = report["recipe"]["data"], AutoTokenizer.from_pretrained(tmp_path / onto)
        adapted = PeftModel.from_pretrained(in_fp32(base), job.only_run() / "adapter").eval()
        unmerged = found.losses.unmerged if onto == "weights" else report["sweet_spot"]["loss"]
        assert loss_of(adapted, tokenizer, records(6, seed=1), data) == pytest.approx(unmerged, rel=1e-5)
        assert loss_of(merged, tokenizer, records(6, seed=1), data) == pytest.approx(found.losses.merged, rel=1e-5)
        sums, before = adapted.merge_and_unload().state_dict(), in_fp32(base).state_dict()
        assert sums.keys() == merged.state_dict().keys()
        for name, value in merged.state_dict().items():
            torch.testing.assert_close(value, sums[name], rtol=2**-8, atol=1e-6, msg=name)  # half a place of bf16
            if "experts" in name and value.ndim == 3:
                assert not any(torch.allclose(*pair, rtol=2**-8) for pair in zip(value, before[name], strict=True))
