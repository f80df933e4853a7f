"""A run's steps: which examples make each, and which seed its dropout has: pure functions of the recipe's seed."""

import math
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.core.lengths import Lengths
from job.core.recipe import TrainSection

_STEPS_LOOKED_AT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """Which examples make each step: a pure function of the seed, so that resuming costs nothing."""

    examples: int
    batch_size: int
    steps: int
    seed: int
    total: int
    """Examples drawn over all steps; the last step of a run by epochs may be smaller."""

    def batch(self, step: int) -> list[int]:
        """The examples of a step (from 1)."""
        first = (step - 1) * self.batch_size
        places = (divmod(at, self.examples) for at in range(first, min(first + self.batch_size, self.total)))
        return [int(epoch_order(self.examples, self.seed, epoch)[place]) for epoch, place in places]

    def largest_step(self, lengths: Lengths) -> int:
        """Tokens of the largest step, of as many as are looked at: in a long run the rest differ little."""
        looked_at = range(1, min(self.steps, _STEPS_LOOKED_AT) + 1)
        return max(int(lengths[self.batch(step)].sum()) for step in looked_at)

    @property
    def epochs(self) -> float:
        """Passes over the training examples."""
        return self.total / self.examples


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Two to the 64th over the golden ratio, splitmix64's step."""


@lru_cache(maxsize=2)
def epoch_order(examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the examples in one epoch.

    Sorted by a hash of (seed, epoch, index): splitmix64, Steele et al. 2014, doi.org/10.1145/2660193.2660195. numpy's
    own shuffle may change between its versions, and a run may be resumed by a newer image.
    """
    with np.errstate(over="ignore"):
        start = _mix(np.uint64(seed) * _GOLDEN + np.uint64(epoch + 1))
        keys = _mix(np.arange(examples, dtype=np.uint64) * _GOLDEN + start)
    return np.argsort(keys, kind="stable")


def dropout_seed(seed: int, step: int, micro_batch: int, *, rank: int = 0) -> int:
    """Seed of a micro-batch's dropout masks, below 2**31: a run that is resumed draws the masks it would have drawn.

    Args:
        seed: the recipe's.
        step: from 1.
        micro_batch: its place in the step, from 0; with several ranks in the rank's share.
        rank: whose share it is.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(np.uint64(seed) * _GOLDEN + np.uint64(step))
        mixed = _mix(mixed + np.uint64(micro_batch + (rank << 32)) * _GOLDEN)
    return int(mixed >> np.uint64(33))


def _mix(z: Any) -> Any:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def evaluation_count(steps: int, every_steps: int) -> int:
    """How often a run is judged: before its first step, every `every_steps`, and after the last one."""
    return 1 + math.ceil(steps / every_steps)


def plan_course(*, examples: int, batch_size: int, steps: int | None, epochs: float | None, seed: int) -> Course:
    """Steps and order of a run, from either its steps or its epochs."""
    # As a decimal number: in binary, 1.1 epochs of 100 examples are a bit more than 110.
    total = steps * batch_size if steps is not None else math.ceil(examples * Decimal(str(epochs or 0)))
    return Course(
        examples=examples,
        batch_size=batch_size,
        steps=steps if steps is not None else math.ceil(total / batch_size),
        seed=seed,
        total=total,
    )


def course_of(train: TrainSection, *, examples: int) -> Course:
    """The steps of a recipe over its training examples."""
    return plan_course(
        examples=examples, batch_size=train.batch_size, steps=train.steps, epochs=train.epochs, seed=train.seed
    )
