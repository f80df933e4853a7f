"""The other training of a recipe that is judged by two seeds: a run of its own, on no channel, on the same objects."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from job.core.attempt.seat import Seat
from job.core.recipe.promote_section import PromoteSection
from job.core.recipe.schema import Recipe
from job.core.reports.report import Report
from job.edge.host.logs import bind
from job.stages.attempt import Attempt, Standing
from job.stages.attempts.guard import Guard
from job.stages.attempts.holding import Held, hold
from job.stages.attempts.identity import Run, same_data

if TYPE_CHECKING:
    from job.stages.ranks.company import Company


def train_other_seed(attempt: Attempt, run: Run, guard: Guard, carry_out: Callable[[Attempt, Held], Report]) -> Report:
    """Carry it to its report, before the run itself is trained, which is judged beside it.

    Args:
        attempt: at the run itself, which is held.
        run: with its objects.
        guard: watches over both.
        carry_out: trains a run that is held.
    """
    mine = at_other_seed(attempt)
    other = same_data(mine.worker.recipe, run)
    report = other.artifacts.read_report()
    if report is not None:
        return report
    number = attempt.standing.number
    assert number is not None, "the run is begun"
    bind(run_id=other.artifacts.run_id)
    try:
        with hold(mine, other, guard) as held:
            report = held.run.artifacts.read_report()
            if report is None:
                held.records.refuse_repeated_failure()
                report = carry_out(mine, held)
    except BaseException:
        attempt.standing.step = mine.standing.step  # where it ended: at the same step twice is the same failure
        raise
    finally:
        attempt.standing.gained_elsewhere |= mine.standing.gained
        bind(run_id=run.artifacts.run_id, attempt=number)
    attempt.runs_at(run.artifacts.uri)
    return report


class Companions:
    """The other processes of both trainings: met once, and not before libraries are loaded."""

    def __init__(self, attempt: Attempt, seat: Seat | None) -> None:
        """As `Company`, at the run itself."""
        self._attempt, self._seat = attempt, seat

    @cached_property
    def company(self) -> "Company":
        """Raises: as `Company`."""
        from job.stages.ranks.company import Company

        return Company(self._attempt, self._seat)


def at_other_seed(attempt: Attempt) -> Attempt:
    """The same process at the other training, with the same limits, and heard by the same ones."""
    worker = replace(attempt.worker, recipe=with_other_seed(attempt.worker.recipe))
    return replace(attempt, worker=worker, run_id=None, standing=Standing(ranks=attempt.standing.ranks), notes=[])


def with_other_seed(recipe: Recipe) -> Recipe:
    """The same recipe with the next seed, on no channel."""
    train = recipe.train.model_copy(update={"seed": recipe.train.seed + 1})
    return recipe.model_copy(update={"train": train, "promote": PromoteSection()})
