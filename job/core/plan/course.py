"""A run's steps: which examples make each, and which seed its dropout has: pure functions of the recipe's seed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.core.data.lengths import Lengths
from job.core.data.mixture import Mixture, Portion, drawn_in_epochs, mixture_of
from job.core.recipe.schema import TrainSection

_STEPS_LOOKED_AT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """Which examples make each step: a pure function of the seed, so that resuming costs nothing."""

    mixture: Mixture
    """The sources; their examples are numbered one source after the other."""
    batch_size: int
    steps: int
    seed: int
    total: int
    """Examples drawn over all steps; the last step of a run by epochs may be smaller."""

    def batch(self, step: int) -> list[int]:
        """The examples of a step (from 1)."""
        first = (step - 1) * self.batch_size
        starts = [0, *accumulate(self.mixture.sizes)]
        return [
            starts[source] + self._example(source, number)
            for source, number in self.mixture.draws(first, min(first + self.batch_size, self.total))
        ]

    def _example(self, source: int, number: int) -> int:
        """The example of a source that it gives when it is drawn for the `number`-th time (from 0)."""
        examples = self.mixture.sizes[source]
        epoch, place = divmod(number, examples)
        return int(_orders(examples, _source_seed(self.seed, source))(epoch)[place])

    def steps_looked_at(self, lengths: Lengths) -> list[tuple[int, int]]:
        """Tokens of each step and of its longest example, of as many steps as are looked at."""
        each = (lengths[batch] for batch in self._batches_looked_at())
        return [(int(own.sum()), int(own.max())) for own in each]

    def drawn(self) -> list[int]:
        """Examples of the steps, one that is drawn twice two times; of as many steps as are looked at."""
        return [example for batch in self._batches_looked_at() for example in batch]

    def _batches_looked_at(self) -> Iterator[list[int]]:
        return (self.batch(step) for step in range(1, min(self.steps, _STEPS_LOOKED_AT) + 1))

    @property
    def examples(self) -> int:
        """Training examples there are, of all sources together."""
        return self.mixture.examples

    @property
    def epochs(self) -> float:
        """Passes over the training examples."""
        return self.total / self.examples

    def passes(self, source: int) -> float:
        """Passes over the examples of one source."""
        return self.total * self.mixture.share(source) / self.mixture.sizes[source]

    def mean_length(self, lengths: Lengths) -> float:
        """Tokens of an example that is drawn, on average: long ones may come from a source that is drawn often."""
        ends = [*accumulate(self.mixture.sizes)]
        means = [float(part.mean()) for part in np.split(lengths, ends[:-1])]
        return sum(self.mixture.share(source) * mean for source, mean in enumerate(means))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Two to the 64th over the golden ratio, splitmix64's step."""


def epoch_order(examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the examples in one epoch.

    Sorted by a hash of (seed, epoch, index): splitmix64, Steele et al. 2014, doi.org/10.1145/2660193.2660195. numpy's
    own shuffle may change between its versions, and a run may be resumed by a newer image.
    """
    with np.errstate(over="ignore"):
        start = _mix(np.uint64(seed) * _GOLDEN + np.uint64(epoch + 1))
        keys = _mix(np.arange(examples, dtype=np.uint64) * _GOLDEN + start)
    return np.argsort(keys, kind="stable")


@lru_cache(maxsize=256)
def _orders(examples: int, seed: int) -> Callable[[int], NDArray[np.int64]]:
    """The epochs' orders of one source; two are remembered, for a step may lie on their border."""
    return lru_cache(maxsize=2)(partial(epoch_order, examples, seed))


def _source_seed(seed: int, source: int) -> int:
    """Sources of one size have orders of their own; the first one has that of a run without others."""
    if source == 0:
        return seed
    with np.errstate(over="ignore"):
        return int(_mix(np.uint64(seed) + np.uint64(source) * _GOLDEN))


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


def plan_course(
    *, examples: int | Sequence[Portion], batch_size: int, steps: int | None, epochs: float | None, seed: int
) -> Course:
    """Steps and order of a run, from either its steps or its epochs.

    Args:
        examples: of the one source, or what is taken of each.
        batch_size: examples a step.
        steps: optimizer steps, or None.
        epochs: passes over the examples, or None.
        seed: of the order.
    """
    portions = [Portion(examples=examples)] if isinstance(examples, int) else examples
    if steps is not None:
        mixture, total = mixture_of(portions), steps * batch_size
    else:
        mixture, total = drawn_in_epochs(portions, epochs or 0)
    return Course(
        mixture=mixture,
        batch_size=batch_size,
        steps=steps if steps is not None else math.ceil(total / batch_size),
        seed=seed,
        total=total,
    )


def course_of(train: TrainSection, *, examples: int | Sequence[Portion]) -> Course:
    """The steps of a recipe over its training examples, or over what is taken of each source."""
    return plan_course(
        examples=examples, batch_size=train.batch_size, steps=train.steps, epochs=train.epochs, seed=train.seed
    )
