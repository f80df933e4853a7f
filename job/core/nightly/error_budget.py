"""How many wrong promotions a channel may expect, over its whole life: what a night may spend of it, and what is left.

A test at 5 % each night promotes about 18 models a year that are no better. What is bounded here is the expected
number of wrong promotions in any 365 days, E[V] <= `per_year`: the per-family error rate, kept by alpha-spending
(Foster & Stine 2008, "alpha-investing", JRSS B 70, 429-444, name it as the rule that theirs replaces; Tian & Ramdas
2021, "Online control of the familywise error rate", Statistical Methods in Medical Research 30, 976-993,
arXiv:1910.04900). Level is earned by the day and spent by the test, whose level is

    level = min(0.05, left / 2),        left' = left - level,        left <= cap = 56 income,
    income = per_year / (365 + 56) a day

so that 365 days spend at most cap + 365 income = per_year, and E[V] = sum P(reject a true null) <= sum of the levels.
A channel that is judged each night settles at level = income, about 1/420 for one wrong promotion a year; one that is
judged seldom saves up, and one that is judged several times a day never spends its last.

Where fresh records judge the challengers before (`fresh_evidence`), a night on which they speak for none of these
saves: its test gets a quarter of what was earned since the last one. A night on which they do, and most nights of a
true gain are such, has half of what was saved, up to 28 days' income. The sum is bounded as before, whatever the levels
depend on; what is added to the assumptions is that new records do not know of the frozen examples: whoever is no better
has, whatever these records say, a p-value on the frozen ones that is at most `level` with at most that chance.

Why not alpha-investing with a reward, LORD++ or SAFFRON (Ramdas et al. 2017, arXiv:1710.00499; 2018,
arXiv:1802.09098), which buy more power with every rejection: they bound the share of wrong ones among the promotions,
not their number; they want each p-value to be valid given all earlier decisions, and here every night asks the same
frozen examples, often with the same champion (onlineFDR's pages name dependence of this kind as outside of what they
promise, and inside of what alpha-spending does); and their levels fade for as long as nothing is rejected. Here the
levels depend on days, tests and fresh records, never on how a test on the frozen examples ended, so that the bound is a
sum over single tests, however much they depend.
"""

from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from job.core.attempt.run_record import first_mistake
from job.core.section import NotNegative, Section, Text, Whole

BUDGET_VERSION: Literal[1] = 1
WRONG_PER_YEAR = 1.0
"""Wrong promotions expected in a year, where the recipe says nothing else."""
YEAR_DAYS = 365
SAVED_DAYS = 56
"""Days whose income is kept for later tests."""
QUIET_SHARE = 0.25
"""Of what was earned since the last test: for one on a night on which fresh records speak for no challenger."""
MOST_LEVEL = 0.05
"""Of one test, whatever has been saved."""
KEPT_TESTS = 1000
"""Tests that are remembered by their run, so that one that is asked for again is not paid again."""
_CLOCKS_APART_DAYS = 2
"""By so much two machines' dates may differ; a day that lies further back corrects a clock that was wrong."""

PerYear = Annotated[float, Field(strict=True, gt=0, le=12, allow_inf_nan=False)]
Day = Annotated[int, Field(strict=True, ge=1, le=date.max.toordinal())]
"""Counted from 0001-01-01, UTC (`date.toordinal`)."""


class Spent(Section):
    """One night's test."""

    run_id: Text
    day: Day
    level: Annotated[float, Field(strict=True, ge=0, le=MOST_LEVEL)]
    """Chance to promote this run, were it no better."""


class ErrorBudget(Section):
    """A channel's budget, as it stands in the store."""

    version: Literal[1] = BUDGET_VERSION
    per_year: PerYear
    """Wrong promotions expected in any 365 days, at most."""
    day: Day
    """The last day whose income was earned."""
    left: NotNegative
    """What later tests may spend, together with what they earn."""
    tests: Whole = 0
    """Over the channel's life."""
    total: NotNegative = 0.0
    """Wrong promotions expected over the channel's life, at most."""
    spent: Annotated[tuple[Spent, ...], Field(max_length=KEPT_TESTS)] = ()
    """The last tests, oldest first."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        runs = {test.run_id for test in self.spent}
        if len(runs) != len(self.spent) or len(self.spent) != min(self.tests, KEPT_TESTS):
            raise ValueError("spent: a run stands there twice, or their number is not that of the tests")
        if self.left > _cap(self.per_year) * _ROUNDED or sum(test.level for test in self.spent) > self.total * _ROUNDED:
            raise ValueError("left, total: more is left than can be saved, or less was spent than the tests say")
        return self

    def level_of(self, run_id: str) -> float | None:
        """What a run's test was paid with; None: it was not, or long ago."""
        return next((test.level for test in self.spent if test.run_id == run_id), None)

    def spent_since(self, day: int) -> float:
        """Wrong promotions expected from this day on, at most; of the tests that are remembered."""
        return sum(test.level for test in self.spent if test.day >= day)


_ROUNDED = 1 + 1e-9
"""Sums of levels in another order differ by less."""


def _income(per_year: float) -> float:
    return per_year / (YEAR_DAYS + SAVED_DAYS)


def _cap(per_year: float) -> float:
    return SAVED_DAYS * _income(per_year)


def quiet_level(per_year: float) -> float:
    """The level of a night that saves, in a channel that is judged each night."""
    return QUIET_SHARE * _income(per_year)


def open_budget(day: int, *, per_year: float = WRONG_PER_YEAR) -> ErrorBudget:
    """The budget of a channel that begins on this day, with as much as gives its first test an ordinary level."""
    return ErrorBudget(per_year=per_year, day=day, left=2 * _income(per_year))


def earned(budget: ErrorBudget, day: int, *, per_year: float) -> ErrorBudget:
    """The budget with the income up to this day, at what the recipe now says a year may have.

    An earlier day earns nothing. One far before the last is a clock that has been put right, and is counted from.
    """
    days = max(0, day - budget.day)
    left = min(_cap(per_year), budget.left + days * _income(per_year))
    counted_from = max(day, budget.day) if day >= budget.day - _CLOCKS_APART_DAYS else day
    return budget.model_copy(update={"per_year": per_year, "day": counted_from, "left": left})


def spend(
    budget: ErrorBudget, run_id: str, day: int, *, per_year: float, saves: bool = False
) -> tuple[ErrorBudget, float]:
    """The budget after a run's test, and the test's level; a run that was paid for keeps its level and costs nothing.

    Args:
        budget: before.
        run_id: the challenger's.
        day: of the test.
        per_year: wrong promotions that the recipe allows a year.
        saves: fresh records judge challengers, and speak for none.
    """
    paid = budget.level_of(run_id)
    if paid is not None:
        return budget, paid
    now = earned(budget, day, per_year=per_year)
    level = min(MOST_LEVEL, now.left / 2)
    if saves:
        level = min(level, QUIET_SHARE * max(1, day - budget.day) * _income(per_year))
    test = Spent(run_id=run_id, day=day, level=level)
    update = {
        "left": now.left - level,
        "tests": now.tests + 1,
        "total": now.total + level,
        "spent": (*now.spent, test)[-KEPT_TESTS:],
    }
    return now.model_copy(update=update), level


def read_error_budget(content: dict[str, Any]) -> ErrorBudget:
    """The budget that a JSON object is.

    Raises:
        ValueError: it is none, with the first value that is wrong.
    """
    try:
        return ErrorBudget.model_validate(content)
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from error
