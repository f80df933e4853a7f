"""Several sources side by side as plain text: what a run takes of each, and what it learned of each."""

from collections.abc import Sequence

from job.core.data.report_data import DataReport, SourceReport
from job.core.lines import cells
from job.core.plan.course import Course
from job.core.reports.report import Report, SourceShare
from job.render.metric_text import loss_text

_MOST_NAME = 20
"""Columns of a name, so that a line has room in 80."""


def source_rows(data: DataReport, course: Course) -> list[str]:
    """A sentence for each source, before the run; empty where there is but one."""
    return [
        (
            f"{source.name}: {source.used} training examples{_left_out(source)}, "
            f"{course.mixture.share(place):.1%} of each step's, {course.passes(place):.3g} epochs; {_lengths(source)}"
        )
        for place, source in enumerate(data.train.sources)
    ]


def source_lines(report: Report) -> list[str]:
    """What was taken of each source, and what was learned of each that is held out; empty where there is but one."""
    return [*_taken(report.data.train.sources, report.plan.sources), *_learned(report)]


def _taken(sources: Sequence[SourceReport], shares: Sequence[SourceShare]) -> list[str]:
    rows = [("source", "examples", "share", "epochs", "drawn", "p50 tokens", "longest")] + [
        (
            _short(source.name),
            f"{source.used:,}",
            f"{share.share:.1%}",
            f"{share.epochs:.3g}",
            f"{share.examples:,}",
            f"{source.percentiles.get('p50', 0):,}",
            f"{source.percentiles.get('p100', 0):,}",
        )
        for source, share in zip(sources, shares, strict=True)
    ]
    return _table(rows) if sources else []


def _learned(report: Report) -> list[str]:
    base = next(iter(report.evaluations))  # before the first step
    chosen = next((each for each in report.evaluations if each.step == report.sweet_spot.step), base)
    rows = [("held out of", "examples", "base loss", "tuned loss")] + [
        (
            _short(before.name),
            f"{before.examples:,}",
            *(loss_text(each.loss, each.plus_minus, sign="+-") for each in (before, after)),
        )
        for before, after in zip(base.sources, chosen.sources, strict=True)
    ]
    return ["", *_table(rows)] if base.sources else []


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(cells(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + row[0]
        + " " * (widths[0] - cells(row[0]))
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _short(name: str) -> str:
    return name if cells(name) <= _MOST_NAME else name[: _MOST_NAME - 3] + "..."


def _lengths(source: SourceReport) -> str:
    return f"{source.percentiles['p50']} tokens at the median, {source.percentiles['p100']} the longest"


def _left_out(source: SourceReport) -> str:
    counted = {
        "wrong lines": source.bad_lines,
        "truncated": source.truncated,
        "dropped": source.dropped,
        "with nothing to learn from": source.without_target,
        "with an empty answer": source.empty,
    }
    seen = [f"{count} {name}" for name, count in counted.items() if count]
    return f" ({', '.join(seen)})" if seen else ""
