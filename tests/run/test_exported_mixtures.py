"""Mixtures as models of their own: trained with adapters on their experts, merged, proved, and read by transformers."""

import json
import shutil

import pytest
import torch
from job_process import records
from test_exported_run import exported, loss_of
from tiny_families import write_family
from tiny_mxfp4 import write_mxfp4
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.core import export as exports
from job.core.export import Export


@pytest.fixture
def mixture(job, base):
    """A job, and what makes its base: published with its experts one by one, or all in MXFP4."""

    def on(write):
        own = shutil.copytree(
            base, job.folder / "own-base", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
        )
        job.recipe["model"]["base"] = str(write(own))
        job.recipe["lora"] = {"r": 4, "alpha": 8, "targets": ["all-linear", "experts"]}
        return job

    return on


def in_bf16(folder):
    return write_family(folder, "qwen3_moe")


@pytest.mark.parametrize("write", [in_bf16, write_mxfp4])
def test_a_mixture_is_exported_onto_its_weights_and_onto_what_was_trained_on(mixture, write, tmp_path, monkeypatch):
    # A random base loses more to 4 bits than a few steps gain.
    monkeypatch.setattr(exports, "QUANTISATION", 1.0)
    job = mixture(write)
    ended = job.start("run")
    assert ended.code == 0, ended.stdout
    report = job.report()
    assert "parameters of experts in 4 bits" in report["model"]["quantisation"]
    assert report["adapter"]["reported_loss"] < report["sweet_spot"]["base_loss"]
    for onto in ("weights", "quantised"):
        ended = exported(job, tmp_path / onto, "--onto", onto)
        assert ended.code == 0, ended.stdout
        found = Export.model_validate_json((tmp_path / onto / "export.json").read_text())
        compared = found.losses.unmerged if onto == "weights" else report["sweet_spot"]["loss"]
        assert found.losses.merged == pytest.approx(compared, rel=1e-2)  # rounded to bf16, some tokens go elsewhere
        assert found.quantised_base == (write is write_mxfp4)

        merged, loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / onto, dtype=torch.float32, output_loading_info=True
        )
        assert not any(loaded[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert "quantization_config" not in json.loads((tmp_path / onto / "config.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / onto)
        lost = loss_of(merged, tokenizer, records(6, seed=1), report["recipe"]["data"])
        assert lost == pytest.approx(found.losses.merged, rel=5e-3)
