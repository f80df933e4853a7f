"""Which source the n-th example of a run comes from: exact shares at every moment, a pure function of n."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from heapq import heapify, heappop, heappush
from math import ceil, gcd, lcm

from job.core.recipe.data_section import DataSection

_STRETCH = 128
"""Draws between two that are written down: what lies between is drawn anew, in a fraction of a millisecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """What a run takes of one source."""

    examples: int
    """The source's own."""
    weight: float | None = None
    """Share of what is drawn, beside the other sources' weights; None: it is counted in passes."""
    epochs: float = 1.0
    """Passes over it in one of the run's epochs."""

    def in_epochs(self, epochs: float) -> Fraction:
        """Examples of so many of the run's epochs, as decimal numbers: 1.1 is a bit more in binary."""
        return self.examples * _as_written(self.epochs) * _as_written(epochs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """Sources and their shares of what is drawn."""

    sizes: tuple[int, ...]
    """Examples of each source."""
    weights: tuple[int, ...]
    """Share of each, in whole numbers without a common divisor; none is 0."""

    @property
    def examples(self) -> int:
        """Of all sources together."""
        return sum(self.sizes)

    def draws(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Source and number within the source of the draws first <= n < last, both from 0.

        After n draws each source has been drawn its share of n times, less than one more or less: the j-th of a source
        is due from the moment when its share exceeds j - 1 until it reaches j, and of those that are due the one goes
        first whose time ends first; of several such the first one listed (Tijdeman 1980, "The chairman assignment
        problem"; taking the largest arrears instead leaves some behind: of twelve, two of them 60 times as heavy as the
        others, by 1.23). After as many draws as the weights add up to, all begins anew.
        """
        period = sum(self.weights)
        if len(self.weights) == 1:
            yield from ((0, n) for n in range(first, last))
            return
        ledger = _ledger(self.weights)
        for rounds in range(first // period, -(-last // period)):
            start = rounds * period
            for source, number in ledger.draws(max(first - start, 0), min(last - start, period)):
                yield source, rounds * self.weights[source] + number

    def drawn(self, total: int) -> tuple[int, ...]:
        """How often each source is drawn in the first `total` draws."""
        if len(self.weights) == 1:
            return (total,)
        rounds, rest = divmod(total, sum(self.weights))
        counts = _ledger(self.weights).counts(rest)
        return tuple(rounds * weight + count for weight, count in zip(self.weights, counts, strict=True))

    def never_drawn(self, total: int) -> int | None:
        """The first source that the first `total` draws leave out; None: none is."""
        return next((source for source, count in enumerate(self.drawn(total)) if not count), None)

    def share(self, source: int) -> float:
        """Of all that is drawn."""
        return self.weights[source] / sum(self.weights)


def portions(data: DataSection, used: Sequence[int]) -> list[Portion]:
    """What a recipe takes of each of its sources, of which `used` examples can be trained on."""
    return [
        Portion(examples=examples, weight=source.weight, epochs=source.epochs)
        for source, examples in zip(data.sources, used, strict=True)
    ]


def mixture_of(portions: Sequence[Portion]) -> Mixture:
    """By weight, or where none has one as often as each is passed over.

    Raises:
        ValueError: some have a weight, and some do not; or a source has no example.
    """
    if len({portion.weight is None for portion in portions}) != 1 or not all(p.examples for p in portions):
        raise ValueError("each source has examples, and all have a weight or none")
    shares = [p.in_epochs(1.0) if p.weight is None else _as_written(p.weight) for p in portions]
    whole = lcm(*(share.denominator for share in shares))
    numbers = [int(share * whole) for share in shares]
    return Mixture(
        sizes=tuple(p.examples for p in portions), weights=tuple(number // gcd(*numbers) for number in numbers)
    )


def drawn_in_epochs(portions: Sequence[Portion], epochs: float) -> tuple[Mixture, int]:
    """The mixture of a run of epochs, and how many examples it draws.

    Without weights each source is drawn just as often as its own epochs say, and the shares follow from that. With
    weights an epoch is as many examples as all sources have together.
    """
    if portions[0].weight is not None or len(portions) == 1:
        every = sum(p.in_epochs(epochs) if len(portions) == 1 else p.examples * _as_written(epochs) for p in portions)
        return mixture_of(portions), ceil(every)
    counts = [ceil(portion.in_epochs(epochs)) for portion in portions]
    weights = tuple(count // gcd(*counts) for count in counts)
    return Mixture(sizes=tuple(p.examples for p in portions), weights=weights), sum(counts)


def _as_written(number: float) -> Fraction:
    return Fraction(Decimal(str(number)))


class _Ledger:
    """How often each source was drawn before every so many draws, written down as far as anybody asked."""

    def __init__(self, weights: tuple[int, ...]) -> None:
        self._weights = weights
        self._before = [(0,) * len(weights)]

    def draws(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Source and number of the draws of one round."""
        for stretch in range(first // _STRETCH, -(-last // _STRETCH)):
            start = stretch * _STRETCH
            drawn = self._drawn(stretch, min(last - start, _STRETCH))
            yield from drawn[max(first - start, 0) :]

    def counts(self, n: int) -> tuple[int, ...]:
        """How often each source is among the first n draws of a round."""
        stretch, rest = divmod(n, _STRETCH)
        drawn = self._drawn(stretch, rest)
        return self._after(stretch, drawn)

    def _drawn(self, stretch: int, many: int) -> list[tuple[int, int]]:
        while len(self._before) <= stretch:
            last = len(self._before) - 1
            self._before.append(self._after(last, _drawn(self._weights, self._before[last], last * _STRETCH, _STRETCH)))
        return _drawn(self._weights, self._before[stretch], stretch * _STRETCH, many)

    def _after(self, stretch: int, drawn: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        counts = list(self._before[stretch])
        for source, _number in drawn:
            counts[source] += 1
        return tuple(counts)


_ledger = lru_cache(maxsize=4)(_Ledger)


def _drawn(weights: Sequence[int], before: Sequence[int], start: int, many: int) -> list[tuple[int, int]]:
    """The draws from `start` on, with how often each source was drawn before."""
    counts, period = list(before), sum(weights)
    waiting = [(count * period // weight, i) for i, (weight, count) in enumerate(zip(weights, counts, strict=True))]
    heapify(waiting)
    due: list[tuple[int, int]] = []
    drawn = []
    for n in range(start, start + many):
        while waiting and waiting[0][0] <= n:
            _, i = heappop(waiting)
            heappush(due, (-(-(counts[i] + 1) * period // weights[i]), i))
        _, i = heappop(due)
        drawn.append((i, counts[i]))
        counts[i] += 1
        heappush(waiting, (counts[i] * period // weights[i], i))
    return drawn
