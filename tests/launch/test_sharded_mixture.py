"""A mixture of experts that two processes share between them, from its published files to its proven adapter."""

import json
import shutil

import pytest
from job_process import Job
from run_material import long_recipe
from test_sharded import same_to_the_bit
from tiny_families import write_family

TWO = ("--gpus", "2")


@pytest.fixture
def job(tmp_path, base, warm):
    """Mixtral's files have an expert's matrices one by one, and other names than its code."""
    folder = shutil.copytree(base, tmp_path / "mixtral", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    made = long_recipe(Job(tmp_path, write_family(folder, "mixtral", layers=5), warm))
    made.recipe["lora"] = {"r": 4, "alpha": 8, "targets": ["all-linear", "experts"]}
    return made


@pytest.mark.ranks
def test_a_mixture_that_is_shared_gives_the_report_of_one_that_each_has_whole(job):
    reports = []
    for name, options in {"whole": (), "shared": ("--base-placement", "sharded")}.items():
        ended = job.start("run", *TWO, "--run-id", name, *options, cold=True)
        assert ended.code == 0, ended.stdout + ended.stderr
        reports.append(json.loads((job.store / f"runs/{name}/report.json").read_text()))
    whole, shared = reports

    same_to_the_bit(shared, whole)
    assert (whole["throughput"]["placement"], shared["throughput"]["placement"]) == ("replicated", "sharded")
    assert "parameters of experts in 4 bits" in shared["model"]["quantisation"]
    assert shared["adapter"]["proven_loss"] == pytest.approx(shared["adapter"]["reported_loss"], rel=1e-3)
    assert shared["throughput"]["bytes_a_step"] > whole["throughput"]["bytes_a_step"]
    page = (job.store / "runs/shared/report.html").read_text()
    assert "2 processes, the base sharded over them" in page
