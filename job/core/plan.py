"""What is decided before the device is touched: lengths -> max_length; steps; batch order; packing."""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from job.core.errors import DataError, UsageError

Lengths = NDArray[np.int32]
"""Tokens of each example, BOS and EOS included."""

PERCENTILES = (50, 90, 95, 99, 100)
_OUTLIER = 2.0
"""An example longer than this many times the 99th percentile is an outlier: it alone would set the memory needed."""
_STEPS_LOOKED_AT = 1000
_ROUND_TO = 32
"""`auto` rounds up to a multiple of this many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxLength:
    """The longest example that is trained on, and why."""

    tokens: int
    reason: str


def choose_max_length(lengths: Lengths, *, wanted: int | Literal["auto"], positions: int) -> MaxLength:
    """Longest example in tokens.

    `auto` covers every example unless a few outliers are far longer than the rest: packing wastes nothing on short
    examples, so a limit is there for the memory that one example needs, not for padding.

    Args:
        lengths: tokens of each example.
        wanted: the recipe's `data.max_length`.
        positions: how many the base model has.

    Raises:
        UsageError: the recipe wants more than the model's positions.
        DataError: there is no example.
    """
    if not len(lengths):
        msg = "no example is left to train on; look at the counts of skipped records in the log"
        raise DataError(msg)
    if wanted != "auto":
        if wanted > positions:
            msg = f"data.max_length is {wanted}, but the base model has {positions} positions; lower it, or write auto"
            raise UsageError(msg)
        return MaxLength(tokens=wanted, reason="set in the recipe" + _cut(lengths, wanted))
    longest, p99 = int(lengths.max()), float(np.percentile(lengths, 99))
    target, why = longest, f"covers the longest example ({longest} tokens)"
    if longest > _OUTLIER * p99:
        target = math.ceil(_OUTLIER * p99)
        why = f"twice the 99th percentile ({p99:.0f} tokens): a few outliers reach {longest}"
    rounded = math.ceil(target / _ROUND_TO) * _ROUND_TO
    if rounded > positions:
        why = f"the base model has {positions} positions, the longest example has {longest} tokens"
    chosen = min(rounded, positions)
    return MaxLength(tokens=chosen, reason=why + _cut(lengths, chosen))


def _cut(lengths: Lengths, limit: int) -> str:
    over = int((lengths > limit).sum())
    if not over:
        return "; no example is longer"
    lost = int(np.maximum(lengths - limit, 0).sum())
    return (
        f"; {over} of {len(lengths)} examples are longer ({lost / int(lengths.sum()):.2%} of the tokens lie beyond it)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthStatistics:
    """How long the examples are, in tokens."""

    percentiles: dict[str, int]
    edges: tuple[int, ...]
    """Bounds of the histogram's bins: bin i holds edges[i] <= length < edges[i + 1] (the last includes its end)."""
    counts: tuple[int, ...]


def length_statistics(lengths: Lengths, *, bins: int = 24) -> LengthStatistics:
    """Percentiles and a histogram with bins of equal, whole width."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, math.ceil((high - low + 1) / bins))
    edges = list(range(low, high + 1 + width, width))
    counts, _ = np.histogram(lengths, bins=edges)
    return LengthStatistics(
        percentiles={f"p{p}": int(np.percentile(lengths, p, method="higher")) for p in PERCENTILES},
        edges=tuple(edges),
        counts=tuple(int(c) for c in counts),
    )


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


@lru_cache(maxsize=2)
def epoch_order(examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the examples in one epoch.

    Sorted by a hash of (seed, epoch, index): splitmix64, Steele et al. 2014, doi.org/10.1145/2660193.2660195. numpy's
    own shuffle may change between its versions, and a run may be resumed by a newer image.
    """
    with np.errstate(over="ignore"):
        start = _mix(np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(epoch + 1))
        keys = _mix(np.arange(examples, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start)
    return np.argsort(keys, kind="stable")


def _mix(z: Any) -> Any:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


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


def pack(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """Best-fit decreasing: documents into micro-batches of at most `budget` tokens each.

    Every document stays whole; each goes where the least room is left. Johnson 1973, "Near-optimal bin packing".

    Args:
        lengths: tokens of each document.
        budget: tokens of a micro-batch.

    Returns:
        Places in `lengths`, a list for each micro-batch, ascending inside.

    Raises:
        ValueError: a document is longer than the budget.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for i in order:
        if lengths[i] > budget:
            msg = f"a document of {lengths[i]} tokens does not fit a micro-batch of {budget}"
            raise ValueError(msg)
        at = bisect_left(room, (lengths[i], -1))
        left, chosen = room.pop(at) if at < len(room) else (budget, len(packs))
        if chosen == len(packs):
            packs.append([])
        packs[chosen].append(i)
        insort(room, (left - lengths[i], chosen))
    return [sorted(members) for members in packs]


def pack_evenly(lengths: Sequence[int], *, most: int, grain: int = 1) -> list[list[int]]:
    """A step's documents into as few micro-batches of at most `most` tokens as hold them, about equally full.

    Four of 13,000 tokens are faster than three of 16,000 and a rest of 4,000: a small one does not fill the device.

    Args:
        lengths: tokens of each document; none is longer than `most`.
        most: tokens of a micro-batch.
        grain: micro-batches that are filled up to a multiple of it are nearly full by themselves, all but the last.

    Returns:
        As `pack`.
    """
    packs = pack(lengths, budget=most)
    even = max(-(-sum(lengths) // max(1, len(packs))), max(lengths, default=0))
    for room in (0, even // 32):  # full to the last token rarely works out, with a little room it does
        budget = -(-(even + room) // grain) * grain
        if budget < most and len(evenly := pack(lengths, budget=budget)) == len(packs):
            return evenly
    return packs
