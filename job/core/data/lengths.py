"""Lengths of the examples -> max_length, what others would cut, and statistics."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from job.core.errors import DataError, UsageError
from job.core.section import Section

Lengths = NDArray[np.int32]
"""Tokens of each example, BOS and EOS included."""
PERCENTILES = (50, 90, 95, 99, 100)
_OUTLIER = 2.0
"""An example longer than this many times the 99th percentile is an outlier: it alone would set the memory needed."""
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
        raise DataError("no example is left to train on; look at the counts of skipped records in the log")
    if wanted != "auto":
        if wanted > positions:
            raise UsageError(
                f"data.max_length is {wanted}, but the base model has {positions} positions; lower it, or write auto"
            )
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
    lost, tokens = int(np.maximum(lengths - limit, 0).sum()), int(lengths.sum())
    return (
        f"; {over} of {len(lengths)} examples are longer ({lost:,} of {tokens:,} tokens, {lost / tokens:.2%}, lie "
        "beyond it)"
    )


class Candidate(Section):
    """A max_length and what it cuts."""

    tokens: int
    """The max_length."""
    examples_over: int
    """Training examples that are longer."""
    share_cut: float
    """Share of all tokens that lie beyond it."""
    targets_cut: float | None = None
    """Share of all target tokens that lie beyond it; None: an earlier version of the job wrote the report."""
    work: float | None = None
    """Operations of an epoch cut there, as times those at the chosen max_length; None: not counted, or none is cut."""


def candidates(
    lengths: Lengths, *, chosen: int, positions: int, targets: Callable[[int], int] | None = None
) -> Sequence[Candidate]:
    """What each max_length would cut: powers of two up to the longest example, and the chosen one.

    Args:
        lengths: of the training examples before the cut.
        chosen: the max_length of the run.
        positions: that the base has.
        targets: how many target tokens lie within a max_length; None: nobody asks.
    """
    longest = int(lengths.max())
    limits = {2**power for power in range(7, 24) if 2**power < 2 * longest and 2**power <= positions} | {chosen}
    total = int(lengths.sum())
    learned = 0 if targets is None else targets(longest)
    return [
        Candidate(
            tokens=limit,
            examples_over=int((lengths > limit).sum()),
            share_cut=int(np.maximum(lengths - limit, 0).sum()) / total,
            targets_cut=None if targets is None or not learned else 1 - targets(limit) / learned,
        )
        for limit in sorted(limits)
    ]


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
