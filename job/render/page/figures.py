"""Draws what a page shows of a run, without any text of strangers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from job.core.data.report_data import Histogram
from job.core.judging.held_out import Compared
from job.core.reports.report import EvaluationReport, Report, SweetSpot, TrainingCurve
from job.render.page.svg import COLOURS, svg, wide
from job.render.pictures import plain_numbers, top_of

_LOG_FROM = 20
"""Times the lowest loss: from there on the highest one would leave the others no height."""
_MOST_POINTS = 200
"""Of a curve: more are noise to the eye, and 50,000 steps would be a page of their own."""
_SMALL = 0.01
_MOST_BINS, _MOST_DOTS, _MOST_RUNS = 60, 500, 6
_LINES = ("blue", "orange", "green", "red", "grey", "blue")
_DASHES = ("-", "--", "-", ":", "-.", ":")


def losses(
    curve: TrainingCurve,
    judged: Sequence[EvaluationReport],
    spot: SweetSpot | None,
    *,
    plus_minus: Sequence[float | None] = (),
) -> Markup:
    """Training and validation loss, with the step that was chosen.

    Args:
        curve: of the training.
        judged: the evaluations.
        spot: the chosen step; None: none was chosen yet.
        plus_minus: for each evaluation half of its interval; empty: not known.
    """

    def draw(axes: Any) -> None:
        steps, means, low, high = _binned(curve.loss)
        if len(steps) < len(curve.loss):
            axes.fill_between(steps, low, high, color=COLOURS["grey"], alpha=0.25, linewidth=0)
        label = "training" if len(steps) == len(curve.loss) else "training, means and range"
        if len(steps):
            axes.plot(steps, means, color=COLOURS["grey"], linewidth=1, label=label)
        seen = _some(judged)
        at, loss = [e.step for e in seen], np.array([e.loss for e in seen])
        if plus_minus:
            by_step = {e.step: around or 0.0 for e, around in zip(judged, plus_minus, strict=True)}
            around = np.array([by_step[step] for step in at])
            axes.fill_between(at, loss - around, loss + around, color=COLOURS["blue"], alpha=0.2, linewidth=0)
        axes.plot(at, loss, color=COLOURS["blue"], marker="o", markersize=3.5, linewidth=1.8, label="validation")
        if spot is not None:
            _mark(axes, spot)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a target token")
        _scale(axes, [e.loss for e in judged], curve.loss)
        axes.legend(frameon=False, loc="best")

    return wide("losses", draw, _of_losses(curve, judged, spot))


def _scale(axes: Any, judged: Sequence[float], trained: Sequence[float]) -> None:
    """The axis of losses; a logarithmic one where they differ much."""
    lowest = min([*judged, *trained], default=0.0)
    top = top_of(judged, trained)
    plain_numbers(axes)
    if lowest > 0 and top / lowest > _LOG_FROM:
        _logarithmic(axes, axes.yaxis)
        axes.set_ylim(lowest / 1.3, top * 1.3)
    else:
        axes.set_ylim(0, top)


def _logarithmic(axes: Any, *which: Any) -> None:
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    for axis in which:
        (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _mark(axes: Any, spot: SweetSpot) -> None:
    label = f"chosen: step {spot.step:,}"
    axes.plot(
        [spot.step], [spot.loss], color=COLOURS["orange"], marker="*", markersize=13, linestyle="none", label=label
    )
    if spot.overfitting_from_step is not None:
        axes.axvline(
            spot.overfitting_from_step, color=COLOURS["red"], linestyle="--", linewidth=1.2, label="overfitting"
        )


def _of_losses(curve: TrainingCurve, judged: Sequence[EvaluationReport], spot: SweetSpot | None) -> str:
    said = [
        f"Validation loss: {_ends([e.loss for e in judged], judged[0].step, judged[-1].step)}."
        if judged
        else "No evaluation yet."
    ]
    if curve.loss:
        said.append(f"Training loss: {_ends(curve.loss, 1, len(curve.loss))}.")
    if spot is not None:
        said.append(f"Step {spot.step} was chosen, with {spot.loss:.4g}.")
    return " ".join(said)


def _ends(values: Sequence[float], first: int, last: int) -> str:
    return f"from {values[0]:.4g} at step {first:,} to {values[-1]:.4g} at step {last:,}"


def by_step(name: str, values: Sequence[float], *, says: str) -> Markup:
    """One value of each step.

    Args:
        name: of the picture in the page.
        values: from step 1 on.
        says: what the values are.
    """

    def draw(axes: Any) -> None:
        steps, means, low, high = _binned(values)
        if len(steps) < len(values):
            axes.fill_between(steps, low, high, color=COLOURS["blue"], alpha=0.25, linewidth=0)
        axes.plot(steps, means, color=COLOURS["blue"], linewidth=1.4)
        axes.set_xlabel("step")
        axes.set_ylabel(says)
        axes.set_ylim(0, _ceiling(values))
        plain_numbers(axes)
        axes.yaxis.set_major_formatter(_tick)

    last = _ends(values, 1, len(values)) if values else "no step yet"
    return svg(name, draw, f"{says.capitalize()}: {last}; highest {max(values, default=0.0):.3g}.")


def lengths(histogram: Histogram, *, max_length: int) -> Markup:
    """How long the training examples are, before the cut."""
    edges, counts = _merged(histogram)

    def draw(axes: Any) -> None:
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=COLOURS["blue"], linewidth=0)
        axes.axvline(max_length, color=COLOURS["red"], linewidth=1.5, label=f"max_length {max_length:,}")
        axes.set_xlabel("tokens of a training example")
        axes.set_ylabel("examples")
        axes.set_xlim(0, max(float(edges[-1]), float(max_length)) * 1.03)
        plain_numbers(axes)
        axes.legend(frameon=False, loc="best")

    most = int(np.argmax(counts)) if len(counts) else 0
    ends = edges[most], edges[min(most + 1, len(edges) - 1)]
    says = f"From {edges[0]:,} to {edges[-1]:,} tokens; most examples have {ends[0]:,} to {ends[1]:,}."
    return svg("lengths", draw, f"{says} max_length is {max_length:,}.")


def examples(found: Compared, step: str) -> Markup:
    """The loss of each held-out example before training and at a step, which has a name."""
    some = [i * len(found.base) // _MOST_DOTS for i in range(_MOST_DOTS)]
    chosen = range(len(found.base)) if len(found.base) <= _MOST_DOTS else some
    base, tuned = (np.array([side[i] for i in chosen]) for side in (found.base, found.tuned))

    def draw(axes: Any) -> None:
        every = np.concatenate([base, tuned, [1.0] if not len(base) else []])
        least, most = float(every.min()), float(every.max())
        if least > 0 and most / least > _LOG_FROM:
            _logarithmic(axes, axes.xaxis, axes.yaxis)
        else:
            least = 0.0
        axes.plot([least, most], [least, most], color=COLOURS["grey"], linestyle="--", linewidth=1, label="no change")
        axes.plot(
            base,
            tuned,
            color=COLOURS["blue"],
            marker="o",
            markersize=3,
            linestyle="none",
            alpha=0.5,
            label="an example",
        )
        far = found.outliers
        if far:
            axes.plot(
                [e.base for e in far],
                [e.tuned for e in far],
                color=COLOURS["orange"],
                marker="D",
                markersize=5,
                linestyle="none",
                label="far from the others",
            )
        axes.set_xlabel("loss of the base")
        axes.set_ylabel(f"loss at {step}")
        axes.legend(frameon=False, loc="best")

    return svg(
        "examples",
        draw,
        f"{found.examples:,} held-out examples: the loss of {found.worse:,} has risen; {found.outliers_in_all:,} lie "
        "far from the others.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """One run of several, in a picture."""

    number: int
    """As the table has it."""
    report: Report


def several(runs: Sequence[RunLine]) -> tuple[Markup, int]:
    """The validation losses of the first runs laid over each other, and how many are not drawn."""
    drawn = runs[:_MOST_RUNS]

    def draw(axes: Any) -> None:
        for place, run in enumerate(drawn):
            seen = _some(run.report.evaluations)
            axes.plot(
                [e.step for e in seen],
                [e.loss for e in seen],
                color=COLOURS[_LINES[place]],
                linestyle=_DASHES[place],
                marker="o",
                markersize=3,
                linewidth=1.6,
                label=f"run {run.number}",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("validation loss, nats a target token")
        _scale(axes, [e.loss for run in drawn for e in run.report.evaluations], ())
        axes.legend(frameon=False, loc="best")

    said = [
        f"run {run.number} from {run.report.sweet_spot.base_loss:.4g} to {run.report.sweet_spot.loss:.4g}"
        for run in drawn
    ]
    says = f"Validation loss: {', '.join(said)}."
    return wide("several", draw, says), len(runs) - len(drawn)


def _some(judged: Sequence[EvaluationReport]) -> list[EvaluationReport]:
    """The evaluations, or as many as are seen apart; the first and the last among them."""
    if len(judged) <= _MOST_POINTS:
        return list(judged)
    return [judged[i * (len(judged) - 1) // (_MOST_POINTS - 1)] for i in range(_MOST_POINTS)]


Floats = NDArray[np.float64]


def _binned(values: Sequence[float]) -> tuple[Floats, Floats, Floats, Floats]:
    """Steps with the mean, the lowest and the highest value of as many as stand for one point."""
    found = np.asarray(values, dtype=np.float64)
    if len(found) <= _MOST_POINTS:
        steps = np.arange(1, len(found) + 1, dtype=np.float64)
        return steps, found, found, found
    starts = np.arange(_MOST_POINTS) * len(found) // _MOST_POINTS
    counts = np.diff(np.append(starts, len(found)))
    means = np.add.reduceat(found, starts) / counts
    return starts + (counts + 1) / 2, means, np.minimum.reduceat(found, starts), np.maximum.reduceat(found, starts)


def _tick(value: float, _place: int | None = None) -> str:
    """A value at an axis: 0.4, and 7.5e-5 where zeros would have to be counted."""
    if value == 0 or abs(value) >= _SMALL:
        return f"{value:g}"
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def _ceiling(values: Sequence[float]) -> float:
    """Above what is usual, so that one value far out does not flatten the others."""
    if not values:
        return 1.0
    usual = 3 * float(np.percentile(values, 99))
    return 1.05 * min(max(values), usual) or 1.0


def _merged(histogram: Histogram) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    edges, counts = np.asarray(histogram.edges, dtype=np.int64), np.asarray(histogram.counts, dtype=np.int64)
    together = -(-len(counts) // _MOST_BINS)
    if together <= 1:
        return edges, counts
    starts = np.arange(0, len(counts), together)
    return np.append(edges[starts], edges[-1]), np.add.reduceat(counts, starts)
