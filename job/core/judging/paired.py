"""How much better or worse one model is than another on the same examples: a paired bootstrap.

Both are judged on the same examples and only the differences count, so that easy and hard ones cancel out; examples
that depend on each other are resampled together (Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640: pairs,
clusters, power). With D the summed difference of a cluster in nats, T its target tokens, and m clusters

    gap = sum D / sum T,        se = sqrt(m / (m - 1) * sum (D - gap T)^2) / sum T

(Cochran 1977, "Sampling Techniques", section 6.4). What is resampled is t = (gap* - gap) / se*, the bootstrap-t of
Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 12.5, and not gap* itself: a nightly gate tests
at levels of 0.001, and that far out the percentiles of gap* are wrong by a factor where differences are skewed; their
error is of the order m^(-1/2), that of the bootstrap-t 1/m (Hall 1988, Annals of Statistics 16, 927-953). A p-value
is (1 + exceedances) / (1 + resamples), which is never 0 (Davison & Hinkley 1997, "Bootstrap Methods", section 4.2),
and never below 2^-k where only k clusters differ at all: no resample can show the ones that happened not to.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from job.core.section import Flag, Section, Whole

RESAMPLES = 20_000
"""Bootstrap resamples: about twenty lie beyond the level of an ordinary night."""
MOST_RESAMPLES = 400_000
"""Where a level is that of many checkpoints, or little of it is left."""
SMALLEST_P = 1 / (1 + MOST_RESAMPLES)
"""That they can show."""
GUARD_RESAMPLES = 4_000
"""Of a slice, at first: what is only guarded is tested at 5 % or a part of it."""
_BEYOND = 20
"""Resamples that are to lie beyond a level: fewer make a p-value near it a matter of luck, and none cannot reach it."""
_LOOKED_AT_AGAIN = 0.05
"""Where a p-value is no larger, as many resamples are drawn as the level asks for."""
CONFIDENCE = 0.95
"""Of the two-sided intervals that people read; what is promoted is decided at the night's level."""
POWER = 0.8
"""Chance with which a difference is seen that counts as one that can be seen."""
ROUNDING = 1e-4
"""Nats a token by which two evaluations of one model may differ, where other sizes of micro-batches round otherwise."""
FEWEST = 20
"""Independent examples or clusters; fewer say nothing of how far others would differ."""
_AT_ONCE = 200_000
"""Drawn numbers held at a time: they stay in a processor's cache."""
_LARGEST_T = 100.0
"""Ends of an interval, in standard errors: where one example makes the spread, resamples without it have none."""
_TAILS = (1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2
_NO_SPREAD = 1e-9
"""Of the mean: a smaller error is rounding, as where every token differs by the same."""
_MOST_EXAMPLES = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Two models' results on the same examples, as differences: below 0 the challenger is better."""

    difference: NDArray[np.float64]
    """The challenger's loss less the champion's, summed over the example's target tokens, in nats: [N]."""
    weight: NDArray[np.float64]
    """Target tokens of each example, above 0: [N]. Or 1 each, where the difference is of wrong answers."""
    cluster: NDArray[np.int64]
    """Examples with the same number depend on each other; all differ where they are independent: [N]."""

    def only(self, examples: NDArray[np.bool_]) -> "Pairs":
        """Those of some of the examples, [N]."""
        return Pairs(difference=self.difference[examples], weight=self.weight[examples], cluster=self.cluster[examples])

    def sums(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Differences and weights, summed within each cluster: [M] each."""
        _, place = np.unique(self.cluster, return_inverse=True)
        difference, weight = (np.bincount(place, weights=part) for part in (self.difference, self.weight))
        return difference.astype(np.float64, copy=False), weight.astype(np.float64, copy=False)


def pairs_of(
    challenger: NDArray[np.float64],
    champion: NDArray[np.float64],
    weight: NDArray[np.float64] | NDArray[np.int64],
    cluster: NDArray[np.int64] | None = None,
) -> Pairs:
    """The differences of two models' results on the same examples.

    Args:
        challenger: summed loss of each example in nats, or 1 where its answer is wrong and 0 where it is right: [N].
        champion: the same examples, in the same order: [N].
        weight: target tokens of each example, or 1 each: [N].
        cluster: a number for each example, the same for those that depend on each other: [N]; None: none do.

    Raises:
        ValueError: the two were not judged on the same examples, or a value is not finite.
    """
    parts = [np.asarray(part, dtype=np.float64) for part in (challenger, champion, weight)]
    numbers = np.arange(len(parts[0])) if cluster is None else np.asarray(cluster, dtype=np.int64)
    if any(part.shape != (len(numbers),) for part in (*parts, numbers)):
        raise ValueError("champion and challenger were not judged on the same examples: their numbers differ")
    if not all(np.isfinite(part).all() for part in parts) or not (parts[2] > 0).all():
        raise ValueError("a loss is not finite, or an example has no target token")
    return Pairs(difference=parts[0] - parts[1], weight=parts[2], cluster=numbers)


class Gap(Section):
    """The difference of two models, and how sure it is: below 0 the challenger is better."""

    examples: Whole
    clusters: Whole
    """Independent groups of them: as many as examples where none belong together."""
    mean: float
    """Nats a token, where every token counts the same; or the share of wrong answers."""
    margin: float
    """By how much a challenger has to be better."""
    standard_error: float | None = None
    """Of the mean; None: too few clusters to say."""
    low: float | None = None
    """End of the 95 % interval where the challenger is at its best."""
    high: float | None = None
    """The other end."""
    p_better: float = 1.0
    """Chance of so large a gain or a larger one, were the challenger not better by the margin."""
    p_worse: float = 1.0
    """Chance of so large a loss or a larger one, were the challenger not worse."""
    identical: Flag = False
    """Every example has the same result."""

    def smallest_seen(self, level: float) -> float | None:
        """The smallest true gain that this many examples show at a level in four cases of five; None: too few."""
        return None if self.standard_error is None else self.margin + _errors_seen(level) * self.standard_error

    def more_examples(self, level: float) -> int | None:
        """How many more would show the measured gain as often; None: there is none, or a billion would not do."""
        gain = -self.mean - self.margin
        if self.standard_error is None or gain <= 0:
            return None
        wanted = self.examples * (_errors_seen(level) * self.standard_error / gain) ** 2
        return max(0, math.ceil(wanted) - self.examples) if wanted < _MOST_EXAMPLES else None


def gap_of(pairs: Pairs, *, min_improvement: float = 0.0, seed: int = 0, resamples: int = RESAMPLES) -> Gap:
    """How large the difference is, and how sure.

    Args:
        pairs: of a challenger and a champion.
        min_improvement: what is better by less is not worth a change; nats a token.
        seed: of the bootstrap; the same one gives the same result.
        resamples: of the bootstrap.
    """
    difference, weight = pairs.sums()
    clusters, margin = len(weight), max(min_improvement, ROUNDING)
    mean = float(difference.sum() / weight.sum()) if clusters else 0.0
    gap = Gap(examples=len(pairs.weight), clusters=clusters, mean=mean, margin=margin)
    if not pairs.difference.any():
        return gap.model_copy(update={"identical": True})
    if clusters < FEWEST:
        return gap
    moments = _moments(difference - mean * weight, weight)
    error = float(_deviation(moments.sum(axis=0), clusters)[1])
    # Where each token differs by the same, the sum's error is rounding, and a resample's is as well.
    t = _resampled(moments, resamples, seed) if error > abs(mean) * _NO_SPREAD else np.zeros(resamples)
    upper, lower = np.clip(np.quantile(t, _TAILS, method="nearest"), -_LARGEST_T, _LARGEST_T)
    lower_than, higher_than = _standardised(mean + margin, error), _standardised(mean - ROUNDING, error)
    differing = int(np.count_nonzero(difference))
    return gap.model_copy(
        update={
            "standard_error": error,
            "low": mean - float(upper) * error,
            "high": mean - float(lower) * error,
            "p_better": _p_value(t <= lower_than, differing),
            "p_worse": _p_value(t >= higher_than, differing),
        }
    )


def gap_at(pairs: Pairs, level: float, *, min_improvement: float = 0.0, seed: int = 0) -> Gap:
    """The same with as many resamples as show a gain at this level, where it may be one."""
    gap = gap_of(pairs, min_improvement=min_improvement, seed=seed)
    wanted = min(MOST_RESAMPLES, _resamples_for(level)) if level else 0
    if wanted <= RESAMPLES or gap.p_better > _LOOKED_AT_AGAIN:
        return gap
    return gap_of(pairs, min_improvement=min_improvement, seed=seed, resamples=wanted)


def gaps_of(pairs: Pairs, slices: Mapping[str, NDArray[np.bool_]], level: float, *, seed: int = 0) -> dict[str, Gap]:
    """The same of each slice, which is some of the examples: [N] each.

    Of a slice that may have got worse as many resamples are drawn as show a loss at the level of the strictest test,
    which many slices make small: with too few of them no slice could ever hold anything up.
    """
    found = {}
    for name, examples in slices.items():
        own = pairs.only(examples)
        found[name] = gap_of(own, seed=seed, resamples=GUARD_RESAMPLES)
        if found[name].p_worse <= _LOOKED_AT_AGAIN and _resamples_for(level) > GUARD_RESAMPLES:
            found[name] = gap_of(own, seed=seed, resamples=_resamples_for(level))
    return found


def _resamples_for(level: float) -> int:
    return math.ceil(_BEYOND / level)


def _standardised(value: float, error: float) -> float:
    return value / error if error else math.copysign(math.inf, value)


def _p_value(exceeds: NDArray[np.bool_], differing: int) -> float:
    """Share of the resamples that exceed, [R], as far as this many clusters that differ at all can show."""
    return max((1 + int(exceeds.sum())) / (1 + len(exceeds)), math.ldexp(1.0, -min(differing, 100)))


def _errors_seen(level: float) -> float:
    """Standard errors between no gain and one that is seen with the usual power."""
    return NormalDist().inv_cdf(POWER) - NormalDist().inv_cdf(level)


def _moments(residual: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a resample's deviation and its error are made of: [M, 5]."""
    return np.stack([residual, weight, residual**2, residual * weight, weight**2], axis=1)


def _deviation(sums: NDArray[np.float64], clusters: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far a resample's gap is from the sample's, and its own standard error, from summed moments [..., 5]."""
    residual, weight, squared, mixed, weight_squared = np.moveaxis(sums, -1, 0)
    off = residual / weight
    around_own_gap = np.maximum(squared - 2 * off * mixed + off**2 * weight_squared, 0.0)
    return off, np.sqrt(around_own_gap * clusters / (clusters - 1)) / weight


def _resampled(moments: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """The resamples' deviations in their own standard errors: [R]."""
    clusters = len(moments)
    rng = np.random.Generator(np.random.PCG64(seed))
    at_once = max(1, _AT_ONCE // clusters)
    parts = []
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        drawn = rng.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters)
        off, error = _deviation(counts @ moments, clusters)
        with np.errstate(divide="ignore", invalid="ignore"):
            # A resample of clusters that are all alike has no spread: it lies infinitely far out, or nowhere.
            parts.append(np.nan_to_num(off / error, nan=0.0, posinf=np.inf, neginf=-np.inf))
    return np.concatenate(parts)
