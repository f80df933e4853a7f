"""Draws the report: the length histogram, and the losses with the sweet spot."""

import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from job.core.reports.report import Report

LENGTHS_PNG, LOSS_PNG = "lengths.png", "loss.png"
_BLUE, _ORANGE, _RED, _GREY, _PALE = "#2a6f97", "#e07a1f", "#b5172f", "#6b7078", "#e4e6e9"
_LONGEST_NAME = 60
_TALLEST = 1.6
"""The loss axis ends at this many times the largest of base loss and usual training loss: a higher curve leaves it."""


def draw(report: Report) -> dict[str, bytes]:
    """Two pictures as PNG, by file name."""
    return {LENGTHS_PNG: _png(_lengths, report), LOSS_PNG: _png(_losses, report)}


def _png(draw_on: Any, report: Report) -> bytes:
    # The object interface with the file backend: no display, no global state, safe beside other threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    draw_on(axes, report)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _lengths(axes: Any, report: Report) -> None:
    data = report.data
    edges, counts = data.train.histogram.edges, data.train.histogram.counts
    widths = [high - low for low, high in itertools.pairwise(edges)]
    axes.bar(edges[:-1], counts, width=widths, align="edge", color=_BLUE, edgecolor="white", linewidth=0.5)
    axes.axvline(data.max_length, color=_RED, linewidth=1.5, label=f"max_length {data.max_length}")
    axes.set_xlabel("tokens of a training example")
    axes.set_ylabel("examples")
    axes.set_title(f"{data.train.rows:,} training examples, {data.train.truncated:,} cut at max_length", pad=12)
    axes.set_xlim(0, max(edges[-1], data.max_length) * 1.03)
    plain_numbers(axes)
    axes.legend(frameon=False, loc="best")


def _losses(axes: Any, report: Report) -> None:
    spot = report.sweet_spot
    _training(axes, report.curve.loss)
    axes.plot(
        [e.step for e in report.evaluations],
        [e.loss for e in report.evaluations],
        color=_BLUE,
        marker="o",
        markersize=4,
        linewidth=1.8,
        label="validation",
    )
    axes.plot(
        [spot.step],
        [spot.loss],
        color=_ORANGE,
        marker="*",
        markersize=16,
        linestyle="none",
        label=f"sweet spot: step {spot.step}, {spot.loss:.4f}",
        zorder=5,
    )
    if spot.overfitting_from_step is not None:
        axes.axvline(
            spot.overfitting_from_step,
            color=_RED,
            linestyle="--",
            linewidth=1.2,
            label=f"overfitting from step {spot.overfitting_from_step}",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a target token")
    axes.set_xlim(-0.02 * max(1, len(report.curve.loss)), 1.02 * max(1, len(report.curve.loss)))
    axes.set_ylim(0, top_of([e.loss for e in report.evaluations], report.curve.loss))
    axes.set_title(f"{_shown(report.model.base)}: {spot.base_loss:.3f} to {spot.loss:.3f}", pad=12)
    plain_numbers(axes)
    axes.legend(frameon=False, loc="best")


def _training(axes: Any, losses: Sequence[float]) -> None:
    """Each step is noise, so a running mean goes over it."""
    if not losses:
        return
    steps = range(1, len(losses) + 1)
    window = len(losses) // 25
    marker = "." if len(losses) <= 50 else None  # noqa: PLR2004 - beyond it they would be a band
    smooth = window >= 5  # noqa: PLR2004 - a mean of fewer is noise too
    pale = 0.35 if smooth else 0.9
    axes.plot(steps, losses, color=_GREY, linewidth=0.8, alpha=pale, marker=marker, label="training, each step")
    if smooth:
        means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
        axes.plot(steps[window - 1 :], means, color=_GREY, linewidth=1.6, label=f"training, mean of {window} steps")


def top_of(judged: Sequence[float], trained: Sequence[float]) -> float:
    """Where the axis of losses ends: the first of `judged` is the base's."""
    losses = [*judged, *trained]
    if not losses:
        return 1.0
    usual = max(judged[0] if judged else 0.0, float(np.median(losses)))
    return min(1.05 * max(losses), _TALLEST * usual) or 1.0


def plain_numbers(axes: Any) -> None:
    """Steps, tokens and examples as whole numbers with thousands apart."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _shown(name: str) -> str:
    """A name that fits, as text: a dollar sign would begin a formula."""
    short = name if len(name) <= _LONGEST_NAME else "..." + name[-_LONGEST_NAME:]
    return short.replace("$", r"\$")
