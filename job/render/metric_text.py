"""Losses with their intervals, and what a metric says of both models' answers: for page, card and terminal."""

from collections.abc import Callable, Mapping

from job.core.judging.answer_metrics import MetricName
from job.core.judging.judged_answers import Gain, MetricReport

METRIC_WORDS: Mapping[MetricName, str] = {
    "exact_match": "exact match",
    "pattern": "match of the pattern",
    "rouge_l": "ROUGE-L",
    "json_equal": "equal JSON",
    "contains": "holds the reference",
}


def compared_with(metric: MetricReport, quoted: Callable[[str], str]) -> str:
    """What was compared with what.

    Args:
        metric: the report's.
        quoted: makes a pattern, or a field's name, fit to be shown.
    """
    place = "the learned answer" if metric.field is None else f"the record's {quoted(metric.field)}"
    match metric.name:
        case "pattern":
            return f"What {quoted(metric.pattern or '')} finds in an answer, compared with {place}:"
        case "rouge_l":
            return f"ROUGE-L of each answer and {place}:"
        case "json_equal":
            return f"Answers that are the same JSON value as {place}:"
        case "contains":
            return f"Answers that hold {place}:"
        case _:
            return f"Answers that are {place}, word for word:"


def gain_text(scores: Gain) -> str:
    """Both means and the gain, and whether it may be chance."""
    around = "" if (ends := interval(scores)) is None else f" (95 % interval, paired: {ends})"
    return (
        f"{scores.before:.1%} → {scores.after:.1%} of {scores.examples:,}, {points(scores.gain)} points{around}"
        f"{by_chance(scores.low, scores.high)}."
    )


def loss_text(loss: float | None, plus_minus: float | None, *, sign: str = "±") -> str:
    """A loss with half of its 95 % interval, where that is known."""
    if loss is None:
        return "-"
    return f"{loss:.4f}" + ("" if plus_minus is None else f" {sign} {plus_minus:.2g}")


def points(gain: float) -> str:
    """A difference of two scores, in points of a hundred."""
    return f"{100 * gain:+.1f}"


def interval(scores: Gain) -> str | None:
    """The gain's 95 % interval in points; None: too few examples to say."""
    if scores.low is None or scores.high is None:
        return None
    return f"{points(scores.low)} to {points(scores.high)}"


def by_chance(low: float | None, high: float | None) -> str:
    """What a change's interval makes of it, to be set behind it; empty: nothing."""
    if low is None or high is None:
        return ", on too few examples to say how sure that is"
    return ", which may be chance" if low < 0 < high else ""


def score_cells(scores: Gain | None) -> tuple[str, str, str, str, str]:
    """Of a table: n, base, tuned, gain, 95 %."""
    if scores is None:
        return "0", "-", "-", "-", "-"
    return (
        f"{scores.examples:,}",
        f"{scores.before:.1%}",
        f"{scores.after:.1%}",
        points(scores.gain),
        interval(scores) or "-",
    )
