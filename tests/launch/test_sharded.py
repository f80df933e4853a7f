"""One command, two processes on the CPU that share one base between them: the report of two that each hold it all."""

import signal

import pytest
from job_process import Job
from layouts import bnb4_base
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
    for key in ("curve", "evaluations", "sweet_spot", "answers", "exact_match"):
        assert report[key] == replicated[key], key
    mine, theirs = ({**each["adapter"], "files": {**each["adapter"]["files"]}} for each in (report, replicated))
    for each in (mine, theirs):
        each["files"].pop("README.md")  # names the run
        each.pop("uri")
    assert mine == theirs


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


@pytest.mark.ranks
def test_one_that_is_asked_to_stop_stops_all_and_they_go_on_to_the_bit(tmp_path, deep, warm, replicated):
    job = job_on(tmp_path, deep, warm)
    with job.begun("run", *SHARDED, cold=True) as running:
        running.until(lambda event: event["event"] == "step" and event["step"] >= 5)
        supervisor = running.child.pid
        strike(supervisor, 1, signal.SIGTERM)
        stopped = running.end()
    assert stopped.code == 75, stopped.stdout + stopped.stderr
    assert nothing_is_left(supervisor)
    assert stopped.outcome["last_committed_step"] >= 5

    resumed = job.start("run", *SHARDED, cold=True)
    assert resumed.code == 0, resumed.stdout + resumed.stderr
    report = job.report()
    same_to_the_bit(report, replicated)
    assert report["resume_exact"] is True


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_the_run_and_nothing_is_left(tmp_path, deep, warm, rank):
    job = job_on(tmp_path, deep, warm)
    with job.begun("run", *SHARDED, cold=True) as running:
        running.until(lambda event: event["event"] == "checkpoint" and event["step"] >= 4)
        supervisor = running.child.pid
        strike(supervisor, rank)
        ended = running.end()
    assert ended.code == 70, ended.stdout + ended.stderr
    assert f"rank {rank} ended without a word" in ended.outcome["reason"]
    assert nothing_is_left(supervisor)


@pytest.mark.ranks
def test_a_base_with_a_value_that_is_not_finite_ends_with_65_before_the_first_step(tmp_path, deep, warm):
    base = tmp_path / "base"
    base.mkdir()
    for path in deep.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    job = job_on(tmp_path / "job", base, warm)
    ended = job.start("run", *SHARDED, cold=True)

    assert ended.code == 65, ended.stdout + ended.stderr
    assert "model.layers.3.mlp.up_proj.weight" in ended.outcome["reason"]


def test_there_is_nothing_to_spread_over_one_process(tmp_path, deep, warm):
    ended = job_on(tmp_path, deep, warm).start("run", "--base-placement", "sharded")

    assert ended.code == 64
    assert "nothing to spread the base over" in ended.outcome["reason"]


@pytest.mark.ranks
def test_a_base_that_is_published_in_4_bits_is_read_as_it_is(tmp_path, deep, warm):
    job = job_on(tmp_path / "job", bnb4_base(deep, tmp_path / "base", bnb_4bit_quant_type="nf4"), warm)
    ended = job.start("run", *SHARDED, cold=True)

    assert ended.code == 0, ended.stdout + ended.stderr
    assert job.report()["throughput"]["placement"] == "sharded"
    assert not (job.workdir / "models" / "quantised").exists()
