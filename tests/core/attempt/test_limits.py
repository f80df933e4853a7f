"""What a stop costs, whether it fits, how often to commit, and when to cut a step: from measured seconds alone."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.attempt.limits import (
    ENDING_SECONDS,
    LONGEST_INTERVAL_SECONDS,
    MARGIN,
    SAVING_SHARE,
    Limits,
    StopCost,
    parse_deadline,
)
from job.core.errors import UsageError

steady = settings(deadline=None, derandomize=True, database=None)
some_seconds = st.floats(0.01, 2000.0)
samples = st.lists(some_seconds, min_size=1, max_size=130)


def limits(*, grace=30.0, deadline=None, step=3.0, save=1.0, upload=4.0, size=486_000_000):
    """Of an attempt that has made two steps and one checkpoint."""
    cost = StopCost()
    for seconds in (60.0, step):  # kernels compile in the first one
        cost.add_step(seconds)
    cost.add_save(save, size)
    cost.add_upload(upload)
    return Limits(grace_seconds=grace, deadline=deadline, cost=cost)


# --- what a stop costs -----------------------------------------------------------------------------------------------


def test_nothing_is_said_before_it_is_measured():
    new = Limits(grace_seconds=30)

    assert new.cost.needed_seconds is None
    assert new.fits is None
    assert new.warning() is None
    new.cost.add_save(1.0, 1000)
    new.cost.add_upload(1.0)
    assert new.fits is None  # no step yet
    assert new.figures().needed_seconds is None


def test_a_stop_needs_a_step_a_save_an_upload_and_the_end_of_the_process():
    assert limits().cost.needed_seconds == 3 + 1 + 4 + ENDING_SECONDS


def test_the_first_step_counts_only_while_it_is_alone():
    """Kernels compile in it; a warning about a grace that it does not fit into would be wrong a minute later."""
    cost = StopCost()
    cost.add_step(60.0)
    assert cost.step_seconds == 60

    cost.add_step(0.4)
    assert cost.step_seconds == 0.4


def test_one_long_step_in_a_hundred_does_not_decide_but_one_long_upload_does():
    """A step can be cut short, an upload cannot."""
    cost = StopCost()
    for n in range(101):
        cost.add_step(40.0 if n == 50 else 1.0)
    for n in range(10):
        cost.add_upload(40.0 if n == 5 else 1.0)
        cost.add_save(7.0 if n == 5 else 1.0, 100 - n)

    assert cost.step_seconds == 1
    assert cost.upload_seconds == 40
    assert cost.save_seconds == 7
    assert cost.checkpoint_bytes == 100


def test_what_was_long_ago_is_forgotten():
    cost = StopCost()
    for seconds in [50.0] * 20 + [1.0] * 100:
        cost.add_step(seconds)
    for seconds in [50.0] + [1.0] * 10:
        cost.add_save(seconds, 1)
        cost.add_upload(seconds)

    assert cost.needed_seconds == 3 + ENDING_SECONDS


@steady
@given(samples)
def test_at_least_nineteen_in_twenty_recent_steps_are_no_longer_than_is_said(steps):
    cost = StopCost(steps=[1.0, *steps])
    recent = steps[-100:]

    assert cost.step_seconds in recent
    assert sum(seconds <= cost.step_seconds for seconds in recent) >= 0.95 * len(recent)


def test_the_report_gets_the_whole_attempt_and_the_slow_link():
    """A Llama-7B r=32 state: 324 MB of adapter, 162 MB of 8-bit moments."""
    figures = limits().figures()

    assert figures.at_100_mb_s_seconds == pytest.approx(1.0 + 4.86)
    assert (figures.step_seconds_p95, figures.step_seconds_max) == (60, 60)
    assert (figures.save_seconds_p95, figures.upload_seconds_max) == (1, 4)
    assert figures.checkpoint_bytes == 486_000_000
    assert figures.needed_seconds == 10
    assert figures.fits is True
    assert figures.grace_seconds == 30


# --- whether it fits -------------------------------------------------------------------------------------------------


def test_a_stop_that_fits_twice_is_not_worth_a_word():
    assert limits(grace=20).fits is True
    assert limits(grace=20).warning() is None


def test_a_stop_that_fits_once_is_warned_of():
    """Measured on a good day."""
    tight = limits(grace=19)

    assert tight.fits is True
    assert tight.warning() == (
        "a stop needs 10 s (step 3.0 s, save 1.0 s, upload 4.0 s, ending 2.0 s) and the grace is 19 s: that is more "
        "than half of it, and a slow day of the store loses the steps since the last commit. Give the scheduler's "
        "grace and --grace-seconds at least 20 s; a smaller lora.r, or a faster way to the store, makes uploads shorter"
    )


def test_a_step_that_does_not_fit_is_said_to_be_dropped():
    long_step = limits(grace=30, step=40.0)

    assert long_step.fits is False
    assert "step 40 s" in long_step.warning()
    assert "the grace is 30 s: a stop drops the step under way." in long_step.warning()
    assert "at least 94 s; a smaller train.batch_size makes steps shorter" in long_step.warning()


def test_a_commit_that_does_not_fit_is_said_to_lose_steps():
    slow_store = limits(grace=30, upload=240.0)

    assert slow_store.fits is False
    assert "upload 4 min" in slow_store.warning()
    assert "loses the steps since the last commit, which is now committed about every 4 min." in slow_store.warning()
    assert "makes uploads shorter" in slow_store.warning()


def test_a_slow_disk_is_named():
    assert "a faster disk under --workdir" in limits(save=50.0).warning()


# --- how often to commit ---------------------------------------------------------------------------------------------


def test_the_recipe_s_interval_is_the_upper_bound():
    assert not limits().checkpoint_due(steps_since=49, seconds_since=1, every_steps=50)
    assert limits().checkpoint_due(steps_since=50, seconds_since=1, every_steps=50)
    assert limits().checkpoint_due(steps_since=50, seconds_since=1, every_steps=50, uploads_under_way=2)


def test_where_a_stop_s_checkpoint_fits_the_clock_asks_each_ten_minutes():
    assert not limits().checkpoint_due(steps_since=5, seconds_since=599, every_steps=50)
    assert limits().checkpoint_due(steps_since=5, seconds_since=600, every_steps=50)


def test_before_anything_is_measured_the_clock_asks_each_ten_minutes():
    assert not Limits(grace_seconds=30).checkpoint_due(steps_since=5, seconds_since=599, every_steps=50)
    assert Limits(grace_seconds=30).checkpoint_due(steps_since=5, seconds_since=600, every_steps=50)


def test_no_checkpoint_without_a_step():
    assert not limits().checkpoint_due(steps_since=0, seconds_since=1e6, every_steps=50)


def test_where_it_does_not_fit_the_clock_asks_as_often_as_uploads_allow():
    """Each stop then loses what is not committed."""
    slow = limits(upload=80.0)

    assert not slow.checkpoint_due(steps_since=5, seconds_since=79, every_steps=50)
    assert slow.checkpoint_due(steps_since=5, seconds_since=80, every_steps=50)
    assert not slow.checkpoint_due(steps_since=5, seconds_since=80, every_steps=50, uploads_under_way=1)


def test_or_as_often_as_saving_may_hold_training_up():
    """Two in a hundred seconds."""
    slow = limits(save=10.0, upload=80.0)

    assert not slow.checkpoint_due(steps_since=5, seconds_since=499, every_steps=50)
    assert slow.checkpoint_due(steps_since=5, seconds_since=500, every_steps=50)


def test_a_long_step_alone_is_no_reason_to_commit_more_often():
    """It is dropped at a stop; its checkpoint fits."""
    assert limits(step=40.0).interval_seconds == LONGEST_INTERVAL_SECONDS


@steady
@given(save=some_seconds, upload=some_seconds, grace=some_seconds)
def test_the_clock_never_costs_more_than_its_share_nor_outruns_the_uploads(save, upload, grace):
    chosen = limits(save=save, upload=upload, grace=grace).interval_seconds

    assert save <= chosen * SAVING_SHARE * (1 + 1e-9)
    assert upload <= chosen
    assert chosen in {save / SAVING_SHARE, upload, LONGEST_INTERVAL_SECONDS}


@steady
@given(save=some_seconds, upload=some_seconds, grace=some_seconds)
def test_a_shorter_grace_never_makes_commits_rarer(save, upload, grace):
    shorter = limits(save=save, upload=upload, grace=grace / 2)

    assert shorter.interval_seconds <= limits(save=save, upload=upload, grace=grace).interval_seconds


# --- the deadline ----------------------------------------------------------------------------------------------------


def test_without_a_deadline_time_never_runs_out():
    assert not limits().must_stop(1e12)
    assert limits().enough_time(1e12)


def test_the_job_stops_by_itself_while_twice_what_it_needs_is_left():
    assert not limits(deadline=1000.0).must_stop(979.9)
    assert limits(deadline=1000.0).must_stop(980.0)


@pytest.mark.parametrize(("grace", "kept"), [(15.0, 15.0), (300.0, 60.0)])
def test_before_it_is_measured_the_grace_is_kept_but_no_more_than_a_minute(grace, kept):
    new = Limits(grace_seconds=grace, deadline=1000.0)

    assert not new.must_stop(1000 - kept - 0.1)
    assert new.must_stop(1000 - kept)
    assert not new.enough_time(1000 - 2 * kept)
    assert new.enough_time(1000 - 2 * kept - 0.1)


@steady
@given(step=some_seconds, save=some_seconds, upload=some_seconds, now=st.floats(0, 1e4))
def test_who_need_not_stop_can_still_make_a_step_and_save_it_twice_over(step, save, upload, now):
    stops = limits(deadline=1e4, step=step, save=save, upload=upload).must_stop(now)

    assert stops or 1e4 - now > MARGIN * (step + save + upload)


# --- the step under way ----------------------------------------------------------------------------------------------


def test_a_step_is_finished_while_save_and_upload_still_fit():
    """7 s of 30 are kept."""
    assert not limits().must_cut_step(now=1023.0, asked_at=1000.0)
    assert limits().must_cut_step(now=1023.1, asked_at=1000.0)


def test_what_cannot_fit_anyway_begins_at_once():
    assert limits(upload=100.0).must_cut_step(now=1000.0, asked_at=1000.0)


def test_uploads_that_go_first_and_the_next_micro_batch_are_reckoned_with():
    assert limits().must_cut_step(now=1019.1, asked_at=1000.0, uploads_under_way=1)
    assert not limits().must_cut_step(now=1018.9, asked_at=1000.0, uploads_under_way=1)
    assert limits().must_cut_step(now=1021.1, asked_at=1000.0, next_look_seconds=2.0)
    assert not limits().must_cut_step(now=1020.9, asked_at=1000.0, next_look_seconds=2.0)


def test_before_the_first_checkpoint_half_of_the_grace_is_kept_for_it():
    assert not Limits(grace_seconds=30).must_cut_step(now=1015.0, asked_at=1000.0)
    assert Limits(grace_seconds=30).must_cut_step(now=1015.1, asked_at=1000.0)


def test_the_nearer_kill_counts():
    near = limits(deadline=1010.0)

    assert near.must_cut_step(now=1003.1, asked_at=1000.0)
    assert near.must_cut_step(now=1003.1, asked_at=None)
    assert not near.must_cut_step(now=1002.9, asked_at=None)
    assert not limits().must_cut_step(now=1e9, asked_at=None)
    assert limits(deadline=2000.0).must_cut_step(now=1023.1, asked_at=1000.0)


@steady
@given(save=some_seconds, upload=some_seconds, grace=some_seconds, into=some_seconds)
def test_a_step_that_is_not_cut_leaves_time_for_its_checkpoint(save, upload, grace, into):
    cut = limits(save=save, upload=upload, grace=grace).must_cut_step(now=into, asked_at=0.0)

    assert cut or into + save + upload <= grace


# --- the deadline as it is written -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "1937952000",
        " 1937952000.0\n",
        "2031-05-31T00:00:00Z",
        "2031-05-31T00:00:00+00:00",
        "2031-05-31T02:00:00+02:00",
        "2031-05-30 20:00:00-04:00",
        "20310531T000000Z",
    ],
)
def test_a_deadline_is_a_moment_in_any_zone(text):
    assert parse_deadline(text) == 1937952000.0


@pytest.mark.parametrize("text", ["2031-05-31T00:00:00", "2031-05-31", "20310531"])
def test_a_time_without_its_zone_is_refused(text):
    """The scheduler's clock may be hours from ours: too late is killed without a save, too early never begins."""
    with pytest.raises(UsageError, match=r"2031-05-28T04:00:00\+02:00, or in Unix seconds"):
        parse_deadline(text)


@pytest.mark.parametrize("text", ["3600", "1937952000000", "-1937952000", "nan", "inf", "1e10", "tomorrow", "", "4 h"])
def test_what_is_no_moment_is_refused(text):
    with pytest.raises(UsageError, match=f"^deadline {text!r}: no moment; write it as "):
        parse_deadline(text)


@steady
@given(
    st.datetimes(min_value=datetime(2002, 1, 1), max_value=datetime(2200, 1, 1)),  # noqa: DTZ001 - the zone comes next
    st.integers(-14 * 60, 14 * 60),
)
def test_every_written_moment_is_read_as_itself(moment, minutes):
    aware = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))

    assert parse_deadline(aware.isoformat()) == aware.timestamp()
    assert parse_deadline(str(int(aware.timestamp()))) == int(aware.timestamp())
    assert datetime.fromtimestamp(parse_deadline(aware.isoformat()), UTC) - aware < timedelta(milliseconds=1)
