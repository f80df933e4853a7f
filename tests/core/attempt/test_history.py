"""What earlier attempts mean: stops that gain nothing, failures that repeat."""

import pytest

from job.core.attempt.history import (
    FINAL_WHEN_REPEATED,
    final_end,
    gained,
    repeated_failure,
    same_failure,
    stopped_in_vain,
)
from job.core.errors import ENDINGS, Again


def stopped(*, from_step=0, committed=None):
    return {"number": 1, "end": {"exit_code": 75, "from_step": from_step, "last_committed_step": committed}}


def failed(code=70, *, step=3, kind="ValueError", phase="train", version="1"):
    end = {"exit_code": code, "step": step, "kind": kind, "phase": phase, "version": version, "reason": "why"}
    return {"number": 1, "end": end}


KILLED = {"number": 1, "end": None}


@pytest.mark.parametrize(
    ("earlier", "in_vain"),
    [
        ([], False),
        ([stopped()], False),
        ([stopped(), stopped()], True),
        ([stopped(from_step=4, committed=4), stopped(from_step=4, committed=4)], True),
        ([stopped(from_step=4, committed=6), stopped(from_step=6, committed=6)], False),
        ([stopped(), stopped(committed=1)], False),
        ([stopped(), KILLED], False),
        ([stopped(), failed()], False),
        ([failed(), stopped(), stopped()], True),
    ],
)
def test_two_stops_in_a_row_without_a_new_step_make_the_next_one_a_stall(earlier, in_vain):
    assert stopped_in_vain(earlier) is in_vain


def test_a_step_is_gained_only_beyond_where_the_attempt_began():
    assert gained(None, {"last_committed_step": 1})
    assert gained(4, {"last_committed_step": 5})
    assert not gained(4, {"last_committed_step": 4})
    assert not gained(0, {"last_committed_step": None})


def test_a_stop_in_another_training_that_goes_on_is_not_in_vain_for_the_run_that_needs_it():
    elsewhere = stopped()
    elsewhere["end"]["gained_elsewhere"] = True
    assert not stopped_in_vain([stopped(), elsewhere])
    assert not stopped_in_vain([elsewhere, stopped()])
    assert stopped_in_vain([elsewhere, stopped(), stopped()])


@pytest.mark.parametrize("name", ["exit_code", "step", "kind", "phase", "version"])
def test_a_failure_that_differs_in_anything_is_another_one(name):
    first = failed()["end"]
    assert same_failure(first, failed()["end"])
    assert not same_failure(first, {**first, name: "another"})


@pytest.mark.parametrize("code", [ending.code for ending in ENDINGS])
def test_only_what_is_tried_again_and_lies_in_the_job_itself_becomes_final(code):
    found = repeated_failure([failed(code), failed(code)])
    assert (found is not None) is (code in FINAL_WHEN_REPEATED)


@pytest.mark.parametrize("row", ENDINGS, ids=lambda row: str(row.code))
def test_an_end_is_final_where_the_table_says_never_or_where_it_came_twice(row):
    never = row.again is Again.NEVER
    assert (final_end([KILLED, failed(row.code)]) is not None) is never
    assert (final_end([failed(row.code), failed(row.code)]) is not None) is (never or row.code in FINAL_WHEN_REPEATED)
    assert final_end([failed(row.code), KILLED]) is None


def test_nothing_is_final_of_a_run_without_an_end_or_with_one_of_another_version():
    assert final_end([]) is None
    assert final_end([failed(code=7)]) is None


def test_an_attempt_that_ended_without_a_word_between_two_failures_begins_the_count_anew():
    assert repeated_failure([failed(), KILLED, failed()]) is None
    assert repeated_failure([failed()]) is None
    assert repeated_failure([KILLED, failed(), failed()])["reason"] == "why"
