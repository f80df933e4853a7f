"""Which run is this: the same, another, or one to go on with. Runs are begun and left before the first step: cheap."""

import pytest
from job_process import records, write_lines


def begin(job, *options):
    ended = job.call("run", *options, stop_in="ask_base")
    assert ended.code == 75, ended.stdout
    return ended


def run_ids(job):
    return [run.name for run in job.runs()]


def test_the_same_job_started_again_is_the_same_run(job):
    begin(job)
    begin(job)
    (run,) = job.runs()
    assert [p.name for p in sorted((run / "attempts").iterdir())] == [
        "01-end.json",
        "01.json",
        "02-end.json",
        "02.json",
    ]


def test_what_cannot_change_the_weights_does_not_change_the_run(job):
    begin(job)
    job.recipe["checkpoint"] = {"every_steps": 1, "keep": 7}
    job.recipe["store"] = {"checksums": False}
    job.recipe["track"] = {"project": "another"}
    begin(job)
    assert len(job.runs()) == 1
    other = job.folder / "other-store"
    begin(job, "--output", f"file://{other}")
    assert [run.name for run in (other / "runs").iterdir()] == run_ids(job)


@pytest.mark.parametrize(
    "override", ["train.seed=1", "lora.r=8", "evaluate.every_steps=2", 'evaluate.prompts=["10 red hats"]']
)
def test_what_can_change_the_weights_or_their_evaluation_makes_another_run(job, override):
    begin(job)
    begin(job, "--set", override)
    assert len(job.runs()) == 2


def test_changed_data_is_a_new_run_also_while_the_old_one_is_unfinished(job):
    begin(job)
    write_lines(job.data / "train.jsonl", records(24, seed=5))
    ended = begin(job)
    assert len(job.runs()) == 2
    assert ended.named("unfinished_run_left")[0]["reason"] == "its data is no longer there as it was"


def test_a_new_file_under_the_glob_waits_until_the_unfinished_run_is_done(job):
    job.recipe["train"]["steps"] = 1
    begin(job)
    write_lines(job.data / "train-2.jsonl", records(5, seed=2))
    assert job.call("run").code == 0
    assert [o["uri"] for o in job.report()["data"]["train"]["objects"]] == [f"file://{job.data}/train.jsonl"]
    begin(job)
    assert len(job.runs()) == 2


def test_a_run_id_of_another_recipe_is_refused_with_the_keys_that_differ(job):
    begin(job, "--run-id", "mine")
    ended = job.call("run", "--run-id", "mine", "--set", "train.seed=1")
    assert ended.code == 78
    (event,) = ended.named("ended")
    assert "recipe.train" in event["reason"]
    assert "leave --run-id out" in event["reason"]
    assert len(list((job.only_run() / "attempts").iterdir())) == 2


def test_a_run_id_with_other_data_is_refused(job):
    begin(job, "--run-id", "mine")
    write_lines(job.data / "train.jsonl", records(24, seed=5))
    ended = job.call("run", "--run-id", "mine")
    assert ended.code == 78
    assert "other data" in ended.named("ended")[0]["reason"]


def test_a_finished_run_id_with_other_data_is_refused_and_with_the_same_is_done(job):
    job.recipe["train"]["steps"] = 1
    assert job.call("run", "--run-id", "mine").code == 0
    again = job.call("run", "--run-id", "mine")
    assert again.code == 0
    assert again.named("already_done")
    write_lines(job.data / "train-2.jsonl", records(5, seed=2))
    assert job.call("run", "--run-id", "mine").code == 78


def test_a_run_id_used_again_elsewhere_does_not_train_on_what_the_work_folder_still_holds(job):
    """The first attempt encoded its data and ended; the same id in another store is another run."""
    begin(job, "--run-id", "mine")
    write_lines(job.data / "train.jsonl", records(7, seed=5))
    job.recipe["train"]["steps"] = 1
    other = job.folder / "other-store"
    ended = job.call("run", "--run-id", "mine", "--output", f"file://{other}")
    assert ended.code == 0, ended.stdout
    assert ended.named("dataset")[0]["train"] == 7


@pytest.mark.parametrize("name", ["../up", "a b", "", "x" * 65])
def test_a_run_id_that_is_no_plain_name_is_refused(job, name):
    ended = job.call("run", "--run-id", name)
    assert ended.code == 64
    assert "--run-id" in ended.named("ended")[0]["reason"]
    assert job.runs() == []


def test_an_output_is_taken_as_it_is_written(job):
    """It goes through YAML on its way, where a colon or a hash means something."""
    odd = job.folder / "a: b #c"
    begin(job, "--output", f"file://{odd}")
    assert len(list((odd / "runs").iterdir())) == 1


def test_a_file_whose_name_looks_like_a_pattern_is_the_same_file_at_the_next_attempt(job):
    (job.data / "train.jsonl").rename(job.data / "train[1].jsonl")
    job.recipe["data"]["train"] = f"file://{job.data}/train*.jsonl"
    begin(job)
    begin(job)
    assert len(job.runs()) == 1
