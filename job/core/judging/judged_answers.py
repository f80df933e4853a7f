"""What a metric says of both models' answers: the mean of each, and the gain with its paired interval."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from job.core.judging.answer_metrics import AnswerMetric, MetricName
from job.core.judging.paired import FEWEST, GUARD_RESAMPLES, RESAMPLES, gap_of, pairs_of
from job.core.judging.slices import Slice, SliceName
from job.core.section import Section, Whole

_DIGITS = 6


class Gain(Section):
    """Scores of the same examples, before and after."""

    examples: Whole
    before: float
    """Mean score, from 0 to 1: of the base; or of the run before."""
    after: float
    """The same of the tuned model."""
    gain: float
    low: float | None = None
    """End of the gain's 95 % interval, paired over the examples; None: too few examples to say."""
    high: float | None = None
    """The other end."""


class SourceGain(Section):
    """Those of one of several sources."""

    name: str
    scores: Gain | None
    """None: none of its examples was judged."""


class SliceGain(Section):
    """Those of one value of a field."""

    slice: SliceName
    scores: Gain | None
    """As above."""


class MetricReport(Section):
    """The answers of held-out examples, by the recipe's metric."""

    name: MetricName
    pattern: str | None = None
    field: str | None = None
    """Of the record, that answers were compared with; None: with the learned answer."""
    max_new_tokens: Whole
    """Where an answer was cut at the latest."""
    scores: Gain
    """Over all that were judged."""
    not_judged: Whole = 0
    """Asked, and without anything that the metric can compare with."""
    sources: tuple[SourceGain, ...] = ()
    """Of the held-out side, in the recipe's order; empty where there is but one."""
    slices: tuple[SliceGain, ...] = ()
    """In the order of `evaluate.slices`."""

    @model_validator(mode="after")
    def _judged_some(self) -> Self:
        if not self.scores.examples:
            raise ValueError("metric: it judged no example")
        return self


def gain_of(before: NDArray[np.float64], after: NDArray[np.float64], *, resamples: int = RESAMPLES) -> Gain | None:
    """The mean scores and the gain; None: there is no example.

    Args:
        before: a score for each example: [N].
        after: of the same examples.
        resamples: of the bootstrap.
    """
    if not len(before):
        return None
    gap = gap_of(pairs_of(1 - after, 1 - before, np.ones(len(before))), resamples=resamples)
    low, high = (gap.low or 0.0, gap.high or 0.0) if gap.clusters >= FEWEST else (None, None)
    return Gain(
        examples=len(before),
        before=round(float(before.mean()), _DIGITS),
        after=round(float(after.mean()), _DIGITS),
        gain=round(-gap.mean, _DIGITS),
        low=None if high is None else round(-high, _DIGITS),
        high=None if low is None else round(-low, _DIGITS),
    )


def metric_report(
    metric: AnswerMetric,
    base: Sequence[float | None],
    tuned: Sequence[float | None],
    *,
    asked: int,
    max_new_tokens: int,
    sources: Sequence[Slice] = (),
    slices: Sequence[Slice] = (),
) -> MetricReport | None:
    """What a report says of the answers; None: none was judged.

    Args:
        metric: the recipe's.
        base: score of each held-out example, None where it was not judged: [N].
        tuned: the same of the tuned model.
        asked: held-out examples that were answered.
        max_new_tokens: longest answer.
        sources: where there are several.
        slices: by field and value.
    """
    judged = np.array([score is not None for score in base], dtype=bool)
    before, after = (np.array([score or 0.0 for score in side], dtype=np.float64) for side in (base, tuned))

    def of(members: NDArray[np.bool_], resamples: int = GUARD_RESAMPLES) -> Gain | None:
        some = members & judged
        return gain_of(before[some], after[some], resamples=resamples)

    scores = of(judged, RESAMPLES)
    if scores is None:
        return None
    return MetricReport(
        name=metric.name,
        pattern=metric.pattern,
        field=metric.field,
        max_new_tokens=max_new_tokens,
        scores=scores,
        not_judged=asked - scores.examples,
        sources=tuple(SourceGain(name=each.name.words, scores=of(each.members)) for each in sources),
        slices=tuple(SliceGain(slice=each.name, scores=of(each.members)) for each in slices),
    )
