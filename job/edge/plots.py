"""Draws the report: the length histogram, and the losses with the sweet spot."""

import io
import itertools
from typing import Any

from job.core.report import Report

LENGTHS_PNG, LOSS_PNG = "lengths.png", "loss.png"
_BLUE, _ORANGE, _RED, _GREY = "#2a6f97", "#e07a1f", "#b5172f", "#8a8f98"


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
    axes.set_title(f"{data.train.rows:,} training examples, {data.train.truncated:,} cut at max_length")
    axes.set_xlim(0, max(edges[-1], data.max_length) * 1.03)
    axes.legend(frameon=False)


def _losses(axes: Any, report: Report) -> None:
    spot = report.sweet_spot
    steps = range(1, len(report.curve.loss) + 1)
    axes.plot(steps, report.curve.loss, color=_GREY, linewidth=0.8, alpha=0.8, label="training, each step")
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
    axes.set_ylim(bottom=0)
    axes.set_title(f"{report.model.base}: {spot.base_loss:.3f} -> {spot.loss:.3f}")
    axes.legend(frameon=False)
