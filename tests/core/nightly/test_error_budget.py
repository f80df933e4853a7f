"""The error budget: no year spends more than it may, whatever the days; a run is paid once; what is read is checked."""

import itertools
import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.nightly.error_budget import (
    KEPT_TESTS,
    MOST_LEVEL,
    QUIET_SHARE,
    SAVED_DAYS,
    YEAR_DAYS,
    ErrorBudget,
    earned,
    open_budget,
    quiet_level,
    read_error_budget,
    spend,
)

FIRST = 739_000
"""A day of 2024."""
quick = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def nights(days, *, per_year=1.0, saves=None):
    """Each test's level and day, one run after another on these days."""
    budget, found = open_budget(FIRST, per_year=per_year), []
    for number, (day, saved) in enumerate(zip(days, saves or itertools.repeat(False), strict=False)):
        budget, level = spend(budget, f"run-{number}", day, per_year=per_year, saves=saved)
        found.append((day, level))
    return budget, found


INCOME = 1 / (YEAR_DAYS + SAVED_DAYS)


def test_a_channel_that_is_judged_each_night_has_a_day_s_income_from_the_first_night_on():
    _, found = nights(range(FIRST, FIRST + 730))

    assert [level for _, level in found] == pytest.approx([INCOME] * 730)


def test_nights_that_save_leave_half_of_it_to_the_one_that_does_not():
    """And the ones after that the half of what is left, and what comes."""
    quiet = 120
    _, found = nights(range(FIRST, FIRST + 122), saves=[False, *[True] * (quiet - 1), False, False])

    assert [level for _, level in found[1:quiet]] == pytest.approx([quiet_level(1.0)] * (quiet - 1))
    assert quiet_level(1.0) == QUIET_SHARE * INCOME
    at_first, then = (level for _, level in found[quiet:])
    assert at_first == pytest.approx(MOST_LEVEL)
    assert then == pytest.approx((SAVED_DAYS * INCOME - MOST_LEVEL + INCOME) / 2)


def test_one_that_is_judged_seldom_saves_of_all_that_it_has_earned():
    _, found = nights(range(FIRST, FIRST + 70, 7), saves=[True] * 10)

    assert [level for _, level in found[1:]] == pytest.approx([7 * quiet_level(1.0)] * 9)


def test_it_is_tested_as_sharply_after_years_without_a_promotion():
    """What fades in alpha-investing: the level depends on days and tests, never on how they ended."""
    _, found = nights(range(FIRST, FIRST + 3 * YEAR_DAYS))

    assert found[-1][1] == pytest.approx(found[YEAR_DAYS][1])


def test_one_that_is_judged_seldom_saves_up_for_eight_weeks():
    _, weekly = nights(range(FIRST, FIRST + 700, 7))
    _, yearly = nights(range(FIRST, FIRST + 4000, 400))

    assert weekly[-1][1] == pytest.approx(7 * INCOME)
    assert [level for _, level in yearly[1:]] == [MOST_LEVEL] * 9
    assert SAVED_DAYS * INCOME / 2 > MOST_LEVEL


def test_several_in_one_night_share_what_is_there_and_never_spend_the_last():
    budget, found = nights([FIRST] * 20)

    assert [later / earlier for (_, earlier), (_, later) in pairwise(found)] == pytest.approx([0.5] * 19)
    assert budget.left > 0


def test_no_test_has_more_than_the_usual_level_however_much_a_year_may_have():
    _, found = nights(range(FIRST, FIRST + 700, 7), per_year=12.0)

    assert max(level for _, level in found) == MOST_LEVEL


@quick
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=200),
    st.floats(0.01, 12),
    st.lists(st.booleans(), min_size=200, max_size=200),
)
def test_no_365_days_spend_more_than_a_year_may(gaps, per_year, saves):
    days = [FIRST + sum(gaps[: place + 1]) for place in range(len(gaps))]
    budget, found = nights(days, per_year=per_year, saves=saves)

    for first, _ in found:
        assert sum(level for day, level in found if first <= day < first + YEAR_DAYS) <= per_year * (1 + 1e-9)
    assert all(0 < level <= MOST_LEVEL for _, level in found)
    assert budget.total == pytest.approx(sum(level for _, level in found))
    assert budget.spent_since(days[-1]) == pytest.approx(sum(level for day, level in found if day == days[-1]))


@quick
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(-3, 40)), min_size=1, max_size=30))
def test_a_run_is_paid_once_however_often_it_is_asked_for(asked):
    """A night that is started twice, or again after a crash between verdict and report."""
    budget, day, levels = open_budget(FIRST), FIRST, {}
    for run_id, later in asked:
        day = max(FIRST, day + later)
        before = budget
        budget, level = spend(budget, run_id, day, per_year=1.0)
        assert level == levels.setdefault(run_id, level)
        assert spend(budget, run_id, day + 100, per_year=1.0) == (budget, level)
        assert (budget == before) == (before.level_of(run_id) is not None)
    assert budget.tests == len(levels)


@quick
@given(st.integers(1, 300), st.integers(0, 60), st.floats(0.01, 12))
def test_it_travels_as_json(tests, every, per_year):
    budget, _ = nights(range(FIRST, FIRST + tests * every + 1, max(every, 1)), per_year=per_year)

    assert read_error_budget(json.loads(budget.model_dump_json())) == budget


def test_only_the_last_tests_are_remembered():
    budget, _ = nights(range(FIRST, FIRST + KEPT_TESTS + 10))

    assert (budget.tests, len(budget.spent), budget.spent[-1].run_id) == (KEPT_TESTS + 10, KEPT_TESTS, "run-1009")
    assert budget.level_of("run-9") is None
    assert read_error_budget(json.loads(budget.model_dump_json())) == budget


def test_a_day_earns_once_and_a_clock_that_is_a_day_behind_earns_nothing():
    budget, _ = nights([FIRST + 5])
    behind = earned(budget, FIRST + 4, per_year=1.0)

    assert earned(budget, FIRST + 5, per_year=1.0) == budget == behind
    assert earned(earned(budget, FIRST + 6, per_year=1.0), FIRST + 6, per_year=1.0).left == pytest.approx(
        budget.left + 1 / (YEAR_DAYS + SAVED_DAYS)
    )


def test_a_clock_that_was_decades_ahead_does_not_stop_the_income_for_decades():
    budget, _ = nights([FIRST, FIRST + 20_000])
    corrected = earned(budget, FIRST + 1, per_year=1.0)

    assert (corrected.day, corrected.left) == (FIRST + 1, budget.left)
    assert earned(corrected, FIRST + 2, per_year=1.0).left > corrected.left


def test_a_recipe_that_allows_less_takes_back_what_was_saved():
    budget = earned(earned(open_budget(FIRST, per_year=2.0), FIRST + 90, per_year=2.0), FIRST + 91, per_year=0.5)

    assert (budget.per_year, budget.left) == (0.5, pytest.approx(0.5 * SAVED_DAYS / (YEAR_DAYS + SAVED_DAYS)))


def wrong(**changes):
    budget, _ = nights([FIRST, FIRST + 1])
    return {**json.loads(budget.model_dump_json()), **changes}


TEST = {"run_id": "run-0", "day": FIRST, "level": 0.01}


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({}, "version|per_year|day|left"),
        (wrong(version=2), "version"),
        (wrong(more=1), "more"),
        (wrong(left=-0.001), "left"),
        (wrong(left=float("nan")), "left"),
        (wrong(left=0.5), "more is left"),
        (wrong(left="0.01"), "left"),
        (wrong(total=0.0), "less was spent"),
        (wrong(day=0), "day"),
        (wrong(day=10**30), "day"),
        (wrong(day=FIRST + 0.5), "day"),
        (wrong(per_year=0.0), "per_year"),
        (wrong(per_year=365.0), "per_year"),
        (wrong(tests=3), "number is not that"),
        (wrong(tests=-1), "tests"),
        (wrong(spent=[TEST, TEST]), "twice"),
        (wrong(spent=[{**TEST, "level": 0.9}], tests=1), "spent.0.level"),
        (wrong(spent=[{**TEST, "run_id": ""}], tests=1), "spent.0.run_id"),
        (wrong(spent=[{**TEST, "run_id": str(n)} for n in range(KEPT_TESTS + 1)], tests=KEPT_TESTS), "spent"),
    ],
)
def test_what_is_no_budget_is_refused_with_the_place(content, where):
    with pytest.raises(ValueError, match=where):
        read_error_budget(content)


def test_it_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        open_budget(FIRST).left = 1.0
    assert isinstance(open_budget(FIRST), ErrorBudget)
