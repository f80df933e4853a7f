"""One command, two processes on the CPU by the real launcher: the report of one, every end the run's, nothing left."""

import json
import signal

import pytest
from many_processes import nothing_is_left, strike, workers_of

TWO = ("--gpus", "2")


def same_within_rounding(report, alone):
    assert report["curve"]["loss"] == pytest.approx(alone["curve"]["loss"], rel=5e-3)
    assert report["curve"]["learning_rate"] == alone["curve"]["learning_rate"]
    for mine, theirs in zip(report["evaluations"], alone["evaluations"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
    assert report["evaluations"][0] == alone["evaluations"][0]  # before the first step, to the bit
    assert [answer["base"] for answer in report["answers"]] == [answer["base"] for answer in alone["answers"]]


def test_two_processes_carry_a_run_to_the_report_that_one_writes(job, alone):
    with job.begun("run", *TWO, cold=True) as running:
        supervisor = running.child.pid
        ended = running.end()

    assert ended.code == 0, ended.stdout + ended.stderr
    assert ended.stderr == ""
    assert nothing_is_left(supervisor)
    report = job.report()
    same_within_rounding(report, alone)
    assert report["resume_exact"] is True
    assert (report["throughput"]["ranks"], report["throughput"]["nodes"]) == (2, 1)
    assert report["throughput"]["tokens"] == alone["throughput"]["tokens"]
    assert report["throughput"]["bytes_a_step"] > 0
    assert report["throughput"]["waited_seconds"] >= 0
    assert report["throughput"]["tokens_per_second_a_rank"] == report["throughput"]["tokens_per_second"] / 2
    assert ended.outcome["code"] == 0
    assert ended.outcome["run_uri"] == report["run_uri"]
    assert [event["step"] for event in ended.named("step")] == [*range(1, 31)]  # once each, by rank 0
    assert [name for name in ended.phases() if name in ("download", "encode")] == ["download", "encode"]
    (joined,) = ended.named("joined")
    assert joined["ranks"] == 2

    again = job.start("run", *TWO, cold=True)
    assert again.code == 0, again.stdout + again.stderr
    assert len(again.named("already_done")) == 1


def test_a_signal_to_one_of_them_stops_the_run_and_another_number_goes_on(job, alone):
    with job.begun("run", *TWO, cold=True) as running:
        running.until(lambda event: event["event"] == "step" and event["step"] >= 5)
        supervisor = running.child.pid
        strike(supervisor, 1, signal.SIGTERM)
        stopped = running.end()
    assert stopped.code == 75, stopped.stdout + stopped.stderr
    assert nothing_is_left(supervisor)
    newest = max(int(path.parent.name[5:11]) for path in job.only_run().glob("checkpoints/*/MANIFEST.json"))
    assert stopped.outcome["last_committed_step"] == newest >= 5
    assert stopped.outcome["reason"] == f"asked to stop; step {newest} of 30 is committed"

    resumed = job.start("run")
    assert resumed.code == 0, resumed.stdout
    assert resumed.named("resumed")[0]["step"] == newest
    report = job.report()
    same_within_rounding(report, alone)
    assert report["resume_exact"] is False
    note = f"resumed at step {newest} in 1 process after 2 processes: equal within rounding, not to the bit"
    assert note in report["notes"]
    assert [attempt["exit_code"] for attempt in report["attempts"]] == [75, 0]


def test_one_that_is_killed_ends_the_run_which_may_be_tried_again(job):
    with job.begun("run", *TWO, cold=True) as running:
        running.until(lambda event: event["event"] == "checkpoint" and event["step"] >= 4)
        supervisor = running.child.pid
        strike(supervisor, 1)
        ended = running.end()

    assert ended.code == 70, ended.stdout
    assert ended.outcome["again"] == "yes, counted"
    assert "rank 1 ended without a word: it was killed" in ended.outcome["reason"]
    assert ended.outcome["last_committed_step"] >= 4
    assert nothing_is_left(supervisor)
    (left,) = [json.loads(path.read_text()) for path in (job.store / "endings").glob("*.json")]
    assert left["reason"] == ended.outcome["reason"]


def test_nothing_outlives_a_supervisor_that_is_killed(job):
    with job.begun("run", *TWO, cold=True) as running:
        running.until(lambda event: event["event"] == "step")
        supervisor = running.child.pid
        assert {0, 1, "launcher"} <= {*workers_of(supervisor)}
        strike(supervisor, "supervisor")
        assert running.end().code == -signal.SIGKILL
        assert nothing_is_left(supervisor)
