"""When a silent or a deaf process is to be ended: told from look to look, on a clock that the test moves."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.attempt.stall import (
    ALLOWED_SECONDS,
    FIRST_STEP_SECONDS,
    LEAST_TRAIN_SECONDS,
    UNLIMITED,
    Deaf,
    Stalled,
    Vigil,
    allowed_seconds,
)

steady = settings(deadline=None, derandomize=True, database=None)
PAUSE = 0.25
JOB = Path(__file__).parents[3] / "job"


class Told:
    """A vigil, and the clock that it is told."""

    def __init__(self, *, allowed=60.0, grace=30.0, deaf=("load_model",)):
        self.now = 1000.0
        self.phase = "train"
        self.asked = False
        by_phase = allowed if callable(allowed) else lambda _phase: allowed
        self.vigil = Vigil(
            self.now, pause_seconds=PAUSE, allowed_seconds=by_phase, grace_seconds=grace, deaf_phases=deaf
        )

    def look(self, *, after=PAUSE, moved=False):
        self.now += after
        return self.vigil.look(self.now, phase=self.phase, moved=moved, asked=self.asked)

    def until_told(self, most=4000, **look):
        """What is told first, and how long it took."""
        began = self.now
        for _ in range(most):
            if told := self.look(**look):
                return told, self.now - began
        return None, self.now - began


# --- silence ---------------------------------------------------------------------------------------------------------


def test_silence_for_longer_than_allowed_is_a_stall():
    told, after = Told(allowed=60.0).until_told()

    assert told == Stalled(phase="train", seconds=60.25)
    assert after == pytest.approx(60, abs=2 * PAUSE)


def test_every_beat_begins_the_silence_anew():
    watched = Told(allowed=60.0)
    for _ in range(10):
        assert watched.until_told(most=239)[0] is None
        assert watched.look(moved=True) is None
    assert watched.until_told()[1] == pytest.approx(60, abs=2 * PAUSE)


def test_a_new_phase_is_a_beat_and_has_its_own_time():
    watched = Told(allowed=lambda phase: {"train": 60.0, "prove": 300.0}[phase])
    assert watched.until_told(most=239)[0] is None
    watched.phase = "prove"

    told, after = watched.until_told()

    assert told.phase == "prove"
    assert after == pytest.approx(300, abs=2 * PAUSE)


@pytest.mark.parametrize("frozen", [2.0, 100.0, 1e6])
def test_a_frozen_process_is_not_a_silent_one(frozen):
    """SIGSTOP, or a machine that was paused: the clock ran on, but nothing here could have moved."""
    watched = Told(allowed=60.0)
    watched.until_told(most=100)

    assert watched.look(after=frozen) is None
    assert watched.until_told()[1] == pytest.approx(60 - 25 - 1, abs=2)


@steady
@given(st.lists(st.floats(PAUSE, PAUSE + 0.9), min_size=1, max_size=300))
def test_late_looks_of_a_busy_machine_count_in_full(gaps):
    """Not every late look is a freeze: the silence is then as long as the clock says."""
    watched = Told(allowed=60.0)
    silent = 0.0
    for n, gap in enumerate(gaps):
        silent += gap if n else 0.0  # the first look enters the phase
        told = watched.look(after=gap)
        assert (told is not None) == (silent > 60) or silent == pytest.approx(60)
        if told:
            return


# --- requests to stop ------------------------------------------------------------------------------------------------


def test_a_phase_that_cannot_hear_is_ended_soon():
    watched = Told(allowed=900.0)
    watched.phase = "load_model"
    assert watched.until_told(most=100)[0] is None
    watched.asked = True

    told, after = watched.until_told()

    assert told == Deaf(phase="load_model", left_seconds=28.0)
    assert after == pytest.approx(2, abs=2 * PAUSE)


def test_a_phase_that_hears_has_the_grace_but_its_last_second():
    watched = Told(allowed=900.0)
    watched.look()
    watched.asked = True

    told, after = watched.until_told(moved=True)

    assert told == Deaf(phase="train", left_seconds=1.0)
    assert after == pytest.approx(29, abs=2 * PAUSE)


def test_a_deaf_phase_that_is_entered_after_the_request_has_its_two_seconds_too():
    watched = Told(allowed=900.0)
    watched.look()
    watched.asked = True
    watched.until_told(most=40)
    watched.phase = "load_model"

    assert watched.until_told()[1] == pytest.approx(2, abs=2 * PAUSE)


def test_but_never_more_than_the_grace():
    watched = Told(allowed=900.0)
    watched.look()
    watched.asked = True
    watched.until_told(most=112)  # 28 s
    watched.phase = "load_model"

    assert watched.until_told()[1] == pytest.approx(1, abs=2 * PAUSE)


def test_a_short_grace_keeps_a_tenth_for_the_last_word():
    watched = Told(grace=2.0)
    watched.look()
    watched.asked = True

    told, after = watched.until_told()

    assert told.left_seconds == pytest.approx(0.2, abs=PAUSE)
    assert after == pytest.approx(1.8, abs=2 * PAUSE)


def test_the_grace_runs_on_while_the_process_is_frozen():
    """The kill does not wait."""
    watched = Told(allowed=900.0)
    watched.look()
    watched.asked = True
    watched.look()

    assert watched.look(after=100.0) == Deaf(phase="train", left_seconds=-70.0)


def test_a_stop_that_is_due_is_told_before_a_stall():
    """75 is started again without counting."""
    watched = Told(allowed=10.0, grace=10.0)
    watched.asked = True

    assert isinstance(watched.until_told()[0], Deaf)


def test_where_the_kill_is_not_known_only_a_deaf_phase_is_ended():
    watched = Told(allowed=900.0, grace=float("inf"))
    watched.look()
    watched.asked = True
    assert watched.until_told(moved=True)[0] is None
    watched.phase = "load_model"

    assert watched.until_told() == (Deaf(phase="load_model", left_seconds=float("inf")), 2 + PAUSE)


def test_a_request_that_is_taken_back_still_counts():
    watched = Told(allowed=900.0)
    watched.asked = True
    watched.look()
    watched.asked = False

    assert isinstance(watched.until_told()[0], Deaf)


# --- the table -------------------------------------------------------------------------------------------------------


def test_training_is_measured_by_its_own_steps():
    assert allowed_seconds("train", longest_step_seconds=None) == FIRST_STEP_SECONDS
    assert allowed_seconds("train", longest_step_seconds=0.4) == LEAST_TRAIN_SECONDS
    assert allowed_seconds("train", longest_step_seconds=60.0) == 1200


def test_the_operator_s_word_holds_for_every_phase():
    for phase in (*ALLOWED_SECONDS, "train", "unheard of"):
        assert allowed_seconds(phase, longest_step_seconds=60.0, override=5.0) == 5


def test_a_phase_without_a_row_has_a_time_too():
    assert allowed_seconds("unheard of", longest_step_seconds=None) == 900


def test_no_phase_is_ended_while_the_store_s_own_patience_lasts():
    """A transfer that is silent for 300 s ends with 69 and its reason, which says more than 83."""
    assert min(*ALLOWED_SECONDS.values(), LEAST_TRAIN_SECONDS) >= 2 * 300


def test_every_phase_of_the_job_has_its_row():
    named = {
        name
        for path in JOB.rglob("*.py")
        for name in re.findall(r"phases\.phase\(\"(\w+)\"\)", path.read_text(encoding="utf-8"))
    }

    assert len(named) > 10
    assert named <= {*ALLOWED_SECONDS, *UNLIMITED, "train"}


def test_who_follows_another_process_s_orders_is_not_watched_by_itself():
    assert allowed_seconds("follow", longest_step_seconds=1.0, override=5.0) == math.inf
