"""Two nodes of a real Slurm that work on one run: the time limit, a node that goes down, the run on what is left."""

import os
import re
import signal

import pytest
from cluster import FROZEN_STEP, TRAIN, frozen_once, until

pytestmark = pytest.mark.slurm
TWO = ("--nodes=2", "--gpus-per-node=1")


def two_worked_on(report):
    """By one process on each of two nodes, and as well as one alone does it, which is tested elsewhere."""
    return (report["throughput"]["ranks"], report["throughput"]["nodes"]) == (2, 2)


def exit_codes(report):
    return [attempt["exit_code"] for attempt in report["attempts"]]


def test_two_nodes_stop_at_the_time_limit_are_queued_again_and_end_the_run(real_slurm, job):
    """The signal reaches the batch script alone; what it passes on reaches every process of both nodes here."""
    job.recipe["lora"]["dropout"] = 0.0
    job.write()
    run = real_slurm.submit(job.folder, *TWO, "--time=60", TRAIN, "recipe.yaml", **frozen_once(job.folder))
    frozen = run.until_frozen()
    scratch = real_slurm.folder / "scratch" / f"qlora-job-{run.number}"
    assert (scratch / "node-1").is_dir()
    assert "2 nodes, 1 processes each" in run.log()
    run.set_limit(run.minutes() + 4)  # less than the script's five
    run.until_log("asked to stop (USR2)")
    run.set_limit(run.minutes() + 60)
    os.kill(frozen, signal.SIGCONT)

    assert run.until_ended()["JobState"] == "COMPLETED", run.log()
    assert (run.exit_code(), run.restarts()) == (0, 1)
    assert "exit code 75; queued again" in run.log()
    assert not scratch.exists()
    report = job.report()
    assert exit_codes(report) == [75, 0]
    assert report["attempts"][1]["from_step"] == FROZEN_STEP
    assert report["resume_exact"] is True
    assert two_worked_on(report)
    assert run.comment()["code"] == 0
    assert len(list((job.store / "endings").glob("*.json"))) == 2  # the run's, not each node's


def test_a_node_that_goes_down_ends_both_and_the_run_goes_on_on_the_other_one(real_slurm, job):
    job.recipe["lora"]["dropout"] = 0.0
    job.write()
    run = real_slurm.submit(job.folder, *TWO, TRAIN, "recipe.yaml", **frozen_once(job.folder))
    frozen = run.until_frozen()
    real_slurm.asked("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        run.until_log("DUE TO NODE FAILURE")
        os.kill(frozen, signal.SIGCONT)
        until(lambda: run.about()["JobState"] == "PENDING", run.log)  # two nodes are no longer there
        real_slurm.asked("scancel", run.number)
        alone = real_slurm.submit(job.folder, "--nodelist=n1", TRAIN, "recipe.yaml")
        assert alone.until_ended()["JobState"] == "COMPLETED", alone.log()
    finally:
        real_slurm.asked("scontrol", "update", "NodeName=n2", "State=RESUME")

    (resumed,) = alone.named("resumed")
    assert resumed["step"] >= 20  # the last checkpoint before it was frozen, or what could still be saved
    report = job.report()
    assert exit_codes(report)[-1] == 0
    assert report["resume_exact"] is False
    assert [note for note in report["notes"] if re.search("in 1 process after 2 processes", note)]


def test_wrong_data_ends_both_nodes_with_65_once(real_slurm, job):
    with (job.data / "train.jsonl").open("a") as file:
        file.write("oops\n")
    run = real_slurm.submit(job.folder, *TWO, TRAIN, "recipe.yaml")

    assert run.until_ended()["JobState"] == "FAILED", run.log()
    assert (run.exit_code(), run.restarts()) == (65, 0)
    assert "train.jsonl:25: not JSON" in run.comment()["reason"]


def test_two_gpus_of_one_node_are_two_processes_of_one_task(real_slurm, job):
    job.recipe["train"]["steps"] = 4
    job.write()
    run = real_slurm.submit(job.folder, "--gpus-per-node=2", TRAIN, "recipe.yaml")

    assert run.until_ended()["JobState"] == "COMPLETED", run.log()
    throughput = job.report()["throughput"]
    assert (throughput["ranks"], throughput["nodes"]) == (2, 1)
