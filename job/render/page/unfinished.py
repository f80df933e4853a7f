"""A run that has no report yet -> what its page shows: how it stands, what is committed of it, what to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from job.core.attempt.run_record import RecordedObject
from job.core.errors import ending
from job.core.reports.report import AttemptReport, EvaluationReport, TrainingCurve
from job.render.page import figures
from job.render.page.blocks import Block, Chapter, Page, Picture, Pictures, Room, Table, Words
from job.render.page.cost import attempts_table
from job.render.page.facts import recipe_blocks
from job.render.page.finished import some_places
from job.render.page.writing import written


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSoFar:
    """What stands in the store of a run without a report."""

    run_id: str
    run_uri: str
    recipe: Mapping[str, Any]
    """The part that is frozen in run.json."""
    objects: Sequence[RecordedObject]
    """Of its data."""
    attempts: Sequence[AttemptReport]
    """In their order."""
    step: int | None
    """The newest committed one; None: nothing is committed."""
    curve: TrainingCurve
    evaluations: Sequence[EvaluationReport]
    plus_minus: Sequence[float | None]
    """For each evaluation half of its 95 % interval."""
    notes: Sequence[str]
    """What could not be read."""


def unfinished_html(run: RunSoFar) -> bytes:
    """The page of a run that is not finished."""
    return written(partial(_page, run))


def _page(run: RunSoFar, room: Room) -> Page:
    return Page(
        title=f"Run {run.run_id}"[:300],
        standing="Not finished",
        verdict=_verdict(run, room),
        figures=_figures(run),
        to_do=[room.cut(f"{each[:1].upper()}{each[1:]}") for each in _to_do(run)],
        to_do_none="",
        chapters=[*_curves(run, room), _attempts(run, room), *_data(run, room), _recipe(run, room)],
    )


def _verdict(run: RunSoFar, room: Room) -> str:
    steps = _planned_steps(run.recipe)
    planned = "" if steps is None else f" of {steps:,}"
    committed = "nothing is committed" if run.step is None else f"step {run.step:,}{planned} is committed"
    said = f"The run is not finished: {committed}."
    if run.evaluations:
        best = min(run.evaluations, key=lambda each: each.loss)
        said += f" The lowest validation loss so far is {best.loss:.4f}, at step {best.step:,}"
        said += f" ({run.evaluations[0].loss:.4f} before training)." if best.step else ", before training."
    if run.attempts:
        last = run.attempts[-1]
        ended = "is at work, or was killed" if last.ended is None else f"ended with {last.exit_code}: {last.reason}"
        said += f" Attempt {last.number} {room.cut(ended)}."
    return said


def _figures(run: RunSoFar) -> dict[str, str]:
    shown = {} if run.step is None else {"committed step": f"{run.step:,}"}
    if run.evaluations:
        shown["validation loss, base"] = f"{run.evaluations[0].loss:.4f}"
        shown["validation loss, last"] = f"{run.evaluations[-1].loss:.4f}"
    return shown | {"attempts": f"{len(run.attempts):,}"}


def _to_do(run: RunSoFar) -> list[str]:
    last = run.attempts[-1] if run.attempts else None
    if last is None or last.ended is None or last.exit_code is None:
        return ["Wait for its end; where nothing works on it, start `run` with its recipe: it goes on where it stands."]
    try:
        return [f"{ending(last.exit_code).action}."]
    except KeyError:
        return ["Start `run` with its recipe: it goes on where it stands."]


def _planned_steps(recipe: Mapping[str, Any]) -> int | None:
    train = recipe.get("train")
    steps = train.get("steps") if isinstance(train, Mapping) else None
    return steps if type(steps) is int else None


def _curves(run: RunSoFar, room: Room) -> list[Chapter]:
    chapters = []
    if run.curve.loss or run.evaluations:
        drawing = figures.losses(run.curve, run.evaluations, None, plus_minus=run.plus_minus)
        caption = "Loss of training and validation, as far as it is committed."
        pictures = [Picture(drawing=drawing, caption=caption, is_wide=True)]
        chapters.append(Chapter(anchor="curves", name="Curves", blocks=[Pictures(pictures=pictures)]))
    if run.evaluations:
        places = some_places(len(run.evaluations), room.rows, keep=len(run.evaluations) - 1)
        rows = [
            (
                f"{(each := run.evaluations[i]).step:,}",
                f"{each.loss:.4f}",
                "-" if (around := run.plus_minus[i]) is None else f"± {around:.2g}",
                f"{each.perplexity:#.4g}",
                f"{each.token_accuracy:.1%}",
            )
            for i in places
        ]
        table = Table(
            caption="Each evaluation",
            head=("step", "loss", "95 %", "perplexity", "token accuracy"),
            rows=rows,
            words=(),
            left_out=len(run.evaluations) - len(rows),
        )
        chapters.append(Chapter(anchor="evaluations", name="Evaluations", blocks=[table]))
    return chapters


def _attempts(run: RunSoFar, room: Room) -> Chapter:
    blocks: list[Block] = [attempts_table(run.attempts, room)] if run.attempts else [Words(text="No attempt yet.")]
    blocks += [Words(text=room.cut(note)) for note in run.notes[: room.rows]]
    return Chapter(anchor="attempts", name="Attempts", blocks=blocks)


def _data(run: RunSoFar, room: Room) -> list[Chapter]:
    rows = [(room.cut(each.uri), f"{each.size:,}") for each in run.objects[: room.rows]]
    table = Table(caption="Objects", head=("object", "bytes"), rows=rows, left_out=len(run.objects) - len(rows))
    return [Chapter(anchor="data", name="Data", blocks=[table])] if rows else []


def _recipe(run: RunSoFar, room: Room) -> Chapter:
    where: list[Block] = [Words(text=room.cut(run.run_uri))]
    return Chapter(anchor="recipe", name="Recipe", blocks=[*where, *recipe_blocks(run.recipe, room)])
