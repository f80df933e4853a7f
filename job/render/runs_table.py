"""Several runs side by side as plain text: what differs in their recipes, what came of it, which is best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.core.report import Report


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


def runs_table(rows: Sequence[RunRow]) -> list[str]:
    """Runs side by side: what differs in their recipes, what came of it, which is best."""
    differences = _differences([row.recipe for row in rows])
    head = ("run", "differs in", "base loss", "tuned loss", "step", "exact match", "tokens/s")
    best = _best(rows)
    finished = [
        (row.run_id, difference, *_figures(row.report)) if row.report else (row.run_id, difference)
        for row, difference in zip(rows, differences, strict=True)
    ]
    widths = [max(len(cells[i]) for cells in (head, *finished) if i < len(cells)) for i in range(len(head))]
    lines = [_line(head, widths)]
    for row, cells in zip(rows, finished, strict=True):
        end = "  <- best" if row is best else "" if row.report else f"  {row.standing}"
        lines.append(_line(cells, widths) + end)
    return [*lines, "", _verdict(rows, best, differences)]


def _figures(report: Report) -> tuple[str, ...]:
    match = report.exact_match
    return (
        f"{report.sweet_spot.base_loss:.4f}",
        f"{report.sweet_spot.loss:.4f}",
        str(report.sweet_spot.step),
        "-" if match is None else f"{match.base:.0%} -> {match.tuned:.0%}",
        f"{report.throughput.tokens_per_second:,.0f}",
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, figures to the right."""
    words, figures = zip(cells[:2], widths[:2], strict=True), zip(cells[2:], widths[2:], strict=False)
    return "  ".join([*(f"{c:<{w}}" for c, w in words), *(f"{c:>{w}}" for c, w in figures)]).rstrip()


def _verdict(rows: Sequence[RunRow], best: RunRow | None, differences: Sequence[str]) -> str:
    if best is not None and best.report is not None:
        recipe = differences[[*rows].index(best)]
        return f"best: {best.run_id} ({recipe or 'no difference'}), the lowest tuned loss: {best.report.adapter.uri}"
    if any(row.report for row in rows):
        return "best: none; the runs were judged on different data or with different base models"
    return "best: none; no run is finished"


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
    held_out = str(report.recipe.get("data", {}).get("validation"))
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
        else:
            values[prefix + key] = str(value)
    return values
