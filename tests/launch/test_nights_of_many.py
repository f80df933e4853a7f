"""Nights on a channel by two processes on the CPU: the verdicts of one, and all of them end alike."""

import json

import pytest
from job_process import records, write_lines
from many_processes import nothing_is_left
from nightly_job import NightlyJob
from run_material import make_base
from transformers import AutoModelForCausalLM, LlamaConfig

TWO = ("--gpus", "2")
SHARDED = (*TWO, "--base-placement", "sharded")


pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The tiny base with five layers, so that two of them are not all."""
    folder = make_base(tmp_path_factory.mktemp("deep"))
    config = LlamaConfig.from_pretrained(folder, num_hidden_layers=5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def a_good_night_and_a_poisoned_one(job, *options, **how):
    """What is said of each, and of the processes; the champion is judged on fresh records before the second trains."""
    ended, good = job.night(*options, **how)
    write_lines(job.data / "train-poison.jsonl", [r | {"answer": "hats hats"} for r in records(200, seed=9)])
    other, bad = job.night(*options, **how)
    job.in_order()
    assert job.promoted()["run_id"] == good["run_id"]
    return (ended, good), (other, bad)


def verdict(report):
    """What does not hang on where the run's folder is."""
    judged = report["promotion"]["judged"]
    decision = judged["decision"]
    champion = decision["champion"] if decision["champion"] == "the base" else "a run"
    return report["promotion"]["outcome"], decision["verdict"], decision["promoted"], champion, decision["level"]


def assert_same(mine, theirs):
    for (_, report), (_, other) in zip(mine, theirs, strict=True):
        assert verdict(report) == verdict(other)
        ours, its = (each["promotion"] for each in (report, other))
        assert ours["new"]["records"] == its["new"]["records"]
        for name in ("challenger_loss", "champion_loss"):
            assert ours["judged"][name] == pytest.approx(its["judged"][name], rel=1e-3), name
        assert ours["judged"]["gap"]["mean"] == pytest.approx(its["judged"]["gap"]["mean"], abs=2e-3)
        assert [each["judged"]["answers"]["examples"] for each in (ours, its)] == [24, 24]
    for good, bad in (mine, theirs):
        asked = [[event["model"] for event in ended.named("asked_anew")] for ended, _ in (good, bad)]
        assert asked == [["the base"], []], "rank 0 asks, and once"
        assert [each["champion"] for each in bad[1]["answers"]] == [each["tuned"] for each in good[1]["answers"]]
    losses = [ended[1][0].named("fresh_records")[0]["losses"] for ended in (mine, theirs)]
    assert [*losses[0].values()] == pytest.approx([*losses[1].values()], rel=1e-3)


def job_in(folder, base, warm):
    folder.mkdir()
    job = NightlyJob(folder, base, warm)
    job.recipe["evaluate"]["answers"] = 24
    return job


@pytest.fixture(scope="module")
def alone(tmp_path_factory, deep, warm):
    """The nights of one process."""
    return a_good_night_and_a_poisoned_one(job_in(tmp_path_factory.mktemp("alone") / "job", deep, warm))


def test_a_night_that_is_promoted_and_one_that_is_refused_are_so_by_two_as_by_one(tmp_path, deep, warm, alone):
    two = a_good_night_and_a_poisoned_one(job_in(tmp_path / "two", deep, warm), *TWO, cold=True)

    assert [verdict(report)[:2] for _, report in alone] == [("promoted", "better"), ("refused", "not better")]
    assert_same(two, alone)
    for (ended, report), name in zip(two, ("promoted", "refused"), strict=True):
        assert report["throughput"]["ranks"] == 2
        assert len(ended.named("joined")) == 1
        assert len(ended.named("judged")) == 1, "rank 0 alone writes to the channel"
        folder = tmp_path / "two" / "store" / "endings"
        kept = [json.loads(path.read_text()) for path in folder.rglob("*.json")]
        (of_it,) = [each for each in kept if each["run_uri"] == report["run_uri"]]
        assert of_it["promotion"]["outcome"] == name
        assert of_it["promotion"]["why"] == report["promotion"]["said"]
    state = json.loads((tmp_path / "two" / "store" / "channels" / "notes" / "state.json").read_text())
    assert [night["work"]["ranks"] for night in state["nights"]] == [2, 2]


def test_a_base_that_is_sharded_is_there_for_each_model_that_is_judged(tmp_path, deep, warm, alone):
    shared = a_good_night_and_a_poisoned_one(job_in(tmp_path / "shared", deep, warm), *SHARDED, cold=True)

    assert_same(shared, alone)
    for ended, report in shared:
        assert report["throughput"]["placement"] == "sharded"
        assert len(ended.named("joined")) == 1


def test_both_trainings_of_two_seeds_are_by_one_group_and_the_next_night_starts_from_the_model_in_use(
    tmp_path, deep, warm
):
    job = job_in(tmp_path / "two", deep, warm)
    job.recipe["promote"]["seeds"] = 2
    with job.begun("run", *TWO, cold=True) as running:
        supervisor = running.child.pid
        ended = running.end()
    assert ended.code == 0, ended.stdout + ended.stderr
    assert nothing_is_left(supervisor)
    assert len(ended.named("joined")) == 2
    first, second = sorted(job.reports().values(), key=lambda report: report["promotion"] is not None)
    assert len(second["promotion"]["judged"]["seeds"]) == 2
    assert [each["run_id"] for each in second["promotion"]["judged"]["others"]] == [first["run_id"]]
    assert {report["throughput"]["ranks"] for report in (first, second)} == {2}
    assert job.promoted()["run_id"] == second["run_id"]

    job.recipe["promote"] |= {"seeds": 1, "start_from": "promoted"}
    job.more("2", 12, seed=5)
    _, third = job.night(*TWO, cold=True)
    assert third["promotion"]["parent"]["run_id"] == second["run_id"]
    begun_with, ended_with = third["evaluations"][0]["loss"], second["sweet_spot"]["loss"]
    assert begun_with == pytest.approx(ended_with, rel=1e-3), "the others got what rank 0 started from"
    job.in_order()


def test_what_ends_a_night_before_its_training_ends_all_of_its_processes(tmp_path, deep, warm):
    job = job_in(tmp_path / "two", deep, warm)
    job.recipe["promote"]["regression"] = f"file://{job.data}/nowhere.jsonl"
    with job.begun("run", *TWO, cold=True) as running:
        supervisor = running.child.pid
        ended = running.end()
    assert ended.code == 66, ended.stdout + ended.stderr
    assert "nowhere.jsonl" in ended.outcome["reason"]
    assert nothing_is_left(supervisor)
    assert job.promoted() is None
