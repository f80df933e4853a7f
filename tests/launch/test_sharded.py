"""One command, two processes on the CPU that share one base between them: the report of two that each hold it all."""

import json
import signal

import pytest
from job_process import Job
from many_processes import nothing_is_left, strike
from run_material import long_recipe, make_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

TWO = ("--gpus", "2")
SHARDED = (*TWO, "--base-placement", "sharded")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The tiny base with five layers, so that two of them are not all."""
    folder = make_base(tmp_path_factory.mktemp("deep"))
    config = LlamaConfig.from_pretrained(folder, num_hidden_layers=5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def job_on(folder, base, warm):
    made = long_recipe(Job(folder, base, warm))
    made.recipe["lora"]["dropout"] = 0.0
    return made


@pytest.fixture(scope="module")
def replicated(tmp_path_factory, deep, warm):
    job = job_on(tmp_path_factory.mktemp("replicated"), deep, warm)
    ended = job.start("run", *TWO, cold=True)
    assert ended.code == 0, ended.stdout + ended.stderr
    assert ended.named("placement")[0]["placement"] == "replicated"
    return job.report()


def same_to_the_bit(report, replicated):
    for key in ("curve", "evaluations", "sweet_spot", "proof", "answers", "adapter"):
        mine, theirs = (
            ({**each} for each in (report[key], replicated[key]))
            if key == "adapter"
            else (report[key], replicated[key])
        )
        if key == "adapter":
            mine["files"].pop("README.md", None)
            theirs["files"].pop("README.md", None)
        assert mine == theirs, key


def test_two_processes_with_one_base_between_them_give_the_report_of_two_with_two(tmp_path, deep, warm, replicated):
    job = job_on(tmp_path, deep, warm)
    with job.begun("run", *SHARDED, cold=True) as running:
        supervisor = running.child.pid
        ended = running.end()

    assert ended.code == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    assert nothing_is_left(supervisor)
    report = job.report()
    same_to_the_bit(report, replicated)
    assert (report["throughput"]["placement"], replicated["throughput"]["placement"]) == ("sharded", "replicated")
    assert report["throughput"]["bytes_a_step"] > replicated["throughput"]["bytes_a_step"]
    assert len(ended.named("joined")) == 1
