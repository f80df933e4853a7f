"""Several runs side by side as plain text: when, on what, what differs, what came of it, which is best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.core.lines import cells
from job.core.reports.report import Report

_BEST = "  <- best"
_WORDS = ("run", "begun (UTC)", "data", "differs in")
_HEAD = (*_WORDS[:2], "minutes", *_WORDS[2:], "base loss", "tuned loss", "step", "exact match", "tokens/s")
_FIRST = 4
"""Columns of a run's first line where it has two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One run of several."""

    run_id: str
    recipe: Mapping[str, Any]
    """The part that is frozen in run.json; empty for a run that is not there."""
    report: Report | None
    """None: there is none yet."""
    standing: str
    """How far a run without a report is."""
    begun: str | None = None
    """When its first attempt started, in UTC, ISO 8601; None: none did."""
    seconds: float | None = None
    """That its attempts took, as far as they left word of their end; None: none did."""
    objects: int = 0
    """Of its data."""
    bytes: int = 0
    """Of its data's objects."""


def newest_first(rows: Sequence[RunRow], *, most: int | None) -> list[RunRow]:
    """The rows by the start of their runs, at most `most`; a run that was not begun comes last."""
    return sorted(rows, key=lambda row: row.begun or "", reverse=True)[:most]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Several runs side by side, as values."""

    head: Sequence[str]
    words: Sequence[str]
    """Of the head those above words; the others stand above figures."""
    cells: Sequence[Sequence[str]]
    """A row for each run; one without a report has fewer."""
    best: int | None
    """The row with the lowest tuned loss; None where losses cannot be compared."""
    verdict: str


def compared(rows: Sequence[RunRow]) -> Compared:
    """What the table says, for others that show it."""
    differences, best = _differences([row.recipe for row in rows]), _best(rows)
    return Compared(
        head=_HEAD,
        words=_WORDS,
        cells=[_cells(row, each) for row, each in zip(rows, differences, strict=True)],
        best=next((place for place, row in enumerate(rows) if row is best), None),
        verdict=_verdict(rows, best, differences),
    )


def runs_table(rows: Sequence[RunRow], *, width: int | None = None) -> list[str]:
    """Runs side by side: a line each, or where that is wider than the terminal two, the second one set in.

    Args:
        rows: in the order in which they are shown.
        width: the terminal's columns; None: lines may have any length.
    """
    differences = _differences([row.recipe for row in rows])
    best = _best(rows)
    table = [_HEAD, *(_cells(row, each) for row, each in zip(rows, differences, strict=True))]
    widths = [max(cells(row[i]) for row in table if i < len(row)) for i in range(len(_HEAD))]
    ends = ["", *(_BEST if row is best else "" if row.report else f"  {row.standing}" for row in rows)]
    lines = [_line(row, widths) + end for row, end in zip(table, ends, strict=True)]
    if width is not None and max(map(cells, lines)) > width:
        lines = [_line(_HEAD[:_FIRST], widths)]
        for row, end in zip(table[1:], ends[1:], strict=True):
            mark, standing = (end, "") if end == _BEST else ("", end.strip())
            lines += [_line(row[:_FIRST], widths) + mark, *_below(row, standing)]
    return [*lines, "", _verdict(rows, best, differences)]


def _cells(row: RunRow, differs_in: str) -> tuple[str, ...]:
    begun = "-" if row.begun is None else row.begun[:16].replace("T", " ")
    minutes = "-" if row.seconds is None else f"{row.seconds / 60:.1f}"
    if row.report is None:
        size = f"{row.bytes / 1e6:,.1f} MB" if row.bytes >= 1e5 else f"{row.bytes:,} bytes"  # noqa: PLR2004 a tenth
        data = f"{row.objects} files, {size}" if row.objects else "-"
        return row.run_id, begun, minutes, data, differs_in
    data = f"{row.report.data.train.used:,}+{row.report.data.validation.used:,} examples"
    return row.run_id, begun, minutes, data, differs_in, *_figures(row.report)


def _figures(report: Report) -> tuple[str, ...]:
    match = report.exact_match
    return (
        f"{report.sweet_spot.base_loss:.4f}",
        f"{report.sweet_spot.loss:.4f}",
        str(report.sweet_spot.step),
        "-" if match is None else f"{match.base:.0%} -> {match.tuned:.0%}",
        f"{report.throughput.tokens_per_second:,.0f}",
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, figures to the right."""
    return "  ".join(
        f"{cell:<{width}}" if name in _WORDS else f"{cell:>{width}}"
        for cell, width, name in zip(row, widths, _HEAD, strict=False)
    ).rstrip()


def _below(row: Sequence[str], standing: str) -> list[str]:
    """What has no room in a run's first line."""
    differs_in, figures = row[_FIRST], zip(_HEAD[_FIRST + 1 :], row[_FIRST + 1 :], strict=False)
    said = (", ".join(f"{name} {cell}" for name, cell in figures if cell != "-"), standing, differs_in)
    return [f"    {each}" for each in said if each]


def _verdict(rows: Sequence[RunRow], best: RunRow | None, differences: Sequence[str]) -> str:
    if best is not None and best.report is not None:
        recipe = differences[[*rows].index(best)]
        named = f"best: {best.run_id} ({recipe or 'no difference'}), the lowest tuned loss"
        return f"{named}{_beside(best.report, rows, best)}: {best.report.adapter.uri}"
    if any(row.report for row in rows):
        return "best: none; the runs were judged on different data or with different base models"
    return "best: none; no run is finished"


def _beside(report: Report, rows: Sequence[RunRow], best: RunRow) -> str:
    """What it is, and the next one's."""
    others = [(row.report.sweet_spot.loss, row.run_id) for row in rows if row.report and row is not best]
    if not others:
        return ""
    loss, run_id = min(others)
    return f", {report.sweet_spot.loss:.4f} beside {loss:.4f} of {run_id}"


def _best(rows: Sequence[RunRow]) -> RunRow | None:
    """The finished run with the lowest tuned loss; None where losses cannot be compared."""
    finished = [(row.report.sweet_spot.loss, i) for i, row in enumerate(rows) if row.report]
    if len({_judged_on(row.report) for row in rows if row.report}) != 1:
        return None
    return rows[min(finished)[1]]


def _judged_on(report: Report) -> tuple[object, ...]:
    """What a loss depends on, the adapter apart: a loss a token also depends on the base's tokenizer."""
    sides = report.data.validation, report.data.train
    objects = next((side.objects for side in sides if side.objects), ())
    data = report.recipe.get("data")
    held_out = str(data.get("validation") if isinstance(data, dict) else data)  # a bucket may hold any recipe
    return (report.model.base, report.model.revision, held_out, *(o.sha256 for o in objects))


def _differences(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each recipe its values of the keys in which they are not all the same: `lora.r=16 train.steps=200`."""
    flat = [_flat(recipe) for recipe in recipes]
    present = [values for values in flat if values]
    keys = sorted({key for values in present for key in values})
    differing = [key for key in keys if len({values.get(key) for values in present}) > 1]
    return [" ".join(f"{key}={values[key]}" for key in differing if key in values) for values in flat]


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    values: dict[str, str] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Sequence) and any(isinstance(each, Mapping) for each in value):  # sources
            values |= _flat({str(place): each for place, each in enumerate(value)}, f"{prefix}{key}.")
        else:
            values[prefix + key] = str(value)
    return values
