"""What the records of an attempt say of its processes and, where it was killed, of how long it had lived."""

from types import SimpleNamespace

import pytest

from job.core.attempt.history import wrong_value
from job.stages.attempt import Standing
from job.stages.attempts.records import AttemptRecords
from job.stages.finishing.report import attempt_report


@pytest.fixture
def store():
    """A run of which nothing but its attempts is known."""
    written = {}
    earlier = [{"number": 1, "fence": 3, "started": "s", "host": "node-1", "ranks": 4, "end": None}]

    def end_attempt(number, facts):
        written[f"{number}-end"] = dict(facts)
        return True

    def begin_attempt(facts):
        written["begun"] = dict(facts)
        return 2

    return SimpleNamespace(
        uri="s3://b/runs/r",
        attempts=lambda newest: earlier[-newest:],
        checkpoints=list,
        end_attempt=end_attempt,
        begin_attempt=begin_attempt,
        begin_run=lambda record, overrides: None,
        leave_ending=lambda ended: None,
        written=written,
        earlier=earlier,
    )


def records(store, *, held_at_least):
    attempt = SimpleNamespace(
        force=False,
        overrides=[],
        started="now",
        hide=str,
        notes=[],
        runs_at=lambda uri: None,
        standing=Standing(ranks=8),
    )
    lock = SimpleNamespace(taken_from=None, held_at_least=held_at_least, fence=4)
    return AttemptRecords(attempt, SimpleNamespace(artifacts=store, record={}), lock)


def test_of_a_killed_attempt_its_successor_writes_down_how_long_it_had_held_the_lock(store):
    records(store, held_at_least=(3, 45)).refuse_repeated_failure()

    end = store.written["1-end"]
    assert (end["exit_code"], end["lasted_at_least"]) == (None, 45)
    assert wrong_value(end) is None
    report = attempt_report(store.earlier[0] | {"end": end})
    assert (report.ended, report.lasted_at_least, report.ranks) == (None, 45, 4)


@pytest.mark.parametrize("held", [None, (2, 45)])
def test_a_lock_that_was_another_s_says_nothing_of_it(store, held):
    records(store, held_at_least=held).refuse_repeated_failure()

    assert "lasted_at_least" not in store.written["1-end"]
    assert attempt_report({"number": 1, "end": None}).ranks is None


def test_an_attempt_is_recorded_with_its_processes(store):
    records(store, held_at_least=None).begin()

    assert store.written["begun"]["ranks"] == 8
    assert wrong_value({"ranks": "8"}) == "ranks is a str"
