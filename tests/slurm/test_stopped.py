"""The two ways in which a cluster stops a job every day: its time limit, and a more important job."""

import os
import signal

import pytest
from cluster import FROZEN_STEP, TRAIN, frozen_once, result

pytestmark = [pytest.mark.slurm, pytest.mark.slurm_short]


def test_at_the_time_limit_the_job_saves_is_queued_again_and_ends_as_if_nothing_had_been(real_slurm, job, undisturbed):
    """The signal before the limit reaches only the batch script, which passes it on."""
    run = real_slurm.submit(job.folder, "--time=60", TRAIN, "recipe.yaml", **frozen_once(job.folder))
    frozen = run.until_frozen()
    run.set_limit(run.minutes() + 4)  # less than the script's five
    run.until_log("asked to stop (USR2)")
    run.set_limit(run.minutes() + 60)
    os.kill(frozen, signal.SIGCONT)

    assert run.until_ended()["JobState"] == "COMPLETED", run.log()
    assert (run.exit_code(), run.restarts()) == (0, 1)
    assert "exit code 75; queued again" in run.log()
    assert [event["exit_code"] for event in run.named("ended")] == [75]
    report = job.report()
    assert [attempt["exit_code"] for attempt in report["attempts"]] == [75, 0]
    assert report["attempts"][1]["from_step"] == FROZEN_STEP
    assert result(report) == result(undisturbed)


def test_a_more_important_job_takes_the_node_and_the_run_goes_on_afterwards(real_slurm, job, undisturbed):
    """PreemptMode=REQUEUE without grace: Slurm queues the job again itself; the script must not do it twice."""
    run = real_slurm.submit(job.folder, "--nodelist=n1", TRAIN, "recipe.yaml", **frozen_once(job.folder))
    run.until_frozen()  # preemption itself lets it go on
    important = real_slurm.occupy("n1")

    assert run.until_ended()["JobState"] == "COMPLETED", run.log()
    assert important.about()["JobState"] == "COMPLETED"
    assert (run.exit_code(), run.restarts()) == (0, 1)
    assert "exit code 75; Slurm has queued it again" in run.log()
    report = job.report()
    assert [attempt["exit_code"] for attempt in report["attempts"]] == [75, 0]
    assert result(report) == result(undisturbed)
