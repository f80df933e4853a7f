"""Reports of finished runs, for people: one in full, or several side by side."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from job.core.attempt.ended import Ended
from job.core.attempt.run_record import first_mistake, recorded_objects
from job.core.errors import DataError, DeniedError, JobError, LocalDiskError, NotFoundError, UsageError
from job.core.recipe.schema import Recipe
from job.core.reports.report import Report
from job.edge.relative_paths import located
from job.edge.run import endings
from job.edge.run.artifacts import Artifacts, begun_runs, finished_runs
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.edge.store.whole_files import whole_file
from job.render.page.finished import report_html
from job.render.page.several import several_html
from job.render.page.unfinished import unfinished_html
from job.render.page.writing import REPORT_HTML
from job.render.pictures import LENGTHS_PNG, LOSS_PNG, draw
from job.render.runs_table import RunRow
from job.stages.attempt import Worker
from job.stages.attempts.identity import find_run
from job.stages.nightly import channel_changes

_LISTED = 10
"""Finished runs that a message names, and endings that are shown, newest first."""


def open_run(run_uri: str) -> tuple[Artifacts, Report]:
    """A finished run by its URI: {output}/runs/{run_id}, or the report.json in it; with the store settings it had.

    Raises:
        NotFoundError: there is no report.
    """
    output, run_id = _parts(run_uri)
    report = _report(Artifacts(open_store(output, StoreSettings()), run_id), output)
    store = recipe_of(report).store
    settings = StoreSettings(sse_kms_key=store.sse_kms_key, checksums=store.checksums)
    return Artifacts(open_store(output, settings), run_id), report


def recipe_of(report: Report) -> Recipe:
    """The recipe that a report holds.

    Raises:
        DataError: it is none of this version of the job.
    """
    try:
        return Recipe.model_validate(report.recipe)
    except ValidationError as error:
        raise DataError(
            f"{report.run_uri}/report.json: its recipe is none that this version of the job reads "
            f"({first_mistake(error)}); use the image that wrote it"
        ) from error


def run_of_recipe(worker: Worker, run_id: str | None) -> tuple[Artifacts, Report]:
    """The finished run that a recipe names now: nothing has changed since it was begun, so `run` would do nothing.

    Raises:
        NotFoundError: `run` would have something to do.
    """
    run = find_run(worker.recipe, run_id=run_id, settings=worker.settings, should_stop=worker.should_stop)
    artifacts = run.artifacts
    return artifacts, _report(artifacts, worker.recipe.output, named_by_recipe=True)


def left_undone(worker: Worker, artifacts: Artifacts) -> NotFoundError | None:
    """The failure that a finished run's report stands beside, where `run` would do something on its channel."""
    undone = channel_changes.left_undone(worker, artifacts)
    return None if undone is None else NotFoundError(f"{undone}; `run` with the recipe does what no GPU is needed for")


def leave_beside(artifacts: Artifacts, report: Report) -> list[str]:
    """Make the report's pictures and its page anew beside it; says where, or that the reader may not write there."""
    try:
        for name, content in {**draw(report), REPORT_HTML: report_html(report)}.items():
            artifacts.publish(name, content)
    except (DeniedError, LocalDiskError) as error:
        return [f"pictures, page: not written ({error})"]
    pictures = ", ".join(f"{artifacts.uri}/{name}" for name in (LENGTHS_PNG, LOSS_PNG))
    return [f"pictures: {pictures}", f"page: {artifacts.uri}/{REPORT_HTML}"]


def write_page(report: Report, file: Path | None) -> list[str]:
    """Write a finished run's page to a local file, if one is named, and say so."""
    return [] if file is None else _written(report_html(report), file)


def page_of_several(rows: Sequence[RunRow], file: Path | None) -> list[str]:
    """The same of several runs."""
    return [] if file is None else _written(several_html(rows), file)


def page_of_unfinished(run_uri: str, file: Path | None) -> list[str]:
    """The same of a run that has no report yet; nothing for one that has, or that is not there."""
    if file is None:
        return []
    output, run_id = _parts(run_uri)
    artifacts = Artifacts(open_store(output, StoreSettings()), run_id)
    record = artifacts.run_record()
    if record is None or artifacts.report() is not None:
        return []
    from job.stages.finishing.so_far import run_so_far

    return [f"not finished: {_standing(artifacts)}", *_written(unfinished_html(run_so_far(artifacts, record)), file)]


def _written(page: bytes, file: Path) -> list[str]:
    with whole_file(file) as written:
        written.write(page)
    return [f"page: {file}"]


def last_endings(names: Sequence[str]) -> list[Ended]:
    """How the last jobs ended on each output that is named as a whole, as `{output}` or `{output}/runs`."""
    outputs = dict.fromkeys(output for name in names if (output := _output(name)) is not None)
    return [ended for output in outputs for ended in _endings(output)]


def run_uris(name: str, *, most: int | None) -> list[str]:
    """The runs that a name means: all of an output, those that a pattern fits, a file's lines, or itself.

    Of an output they are the newest ones, at most `most`: there may be thousands.

    Raises:
        NotFoundError: it means none.
    """
    if "://" not in name and Path(name).is_file():
        lines = (line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines())
        found = [line for line in lines if line and not line.startswith("#")]
    else:
        whole = _output(name)
        output, run_id = _parts(name) if whole is None else (whole, "*")
        if not set(run_id) & set("*?["):
            return [name]
        store = open_store(output, StoreSettings())
        fitting = [each for each in begun_runs(store) if fnmatchcase(each, run_id)]
        found = [Artifacts(store, each).uri for each in fitting[:most]]
    if not found:
        raise NotFoundError(f"{located(name)}: no run is named there", action="name a run, or wait until one is begun")
    return found


def look_at(run_uri: str) -> RunRow:
    """How one run of several stands, whether it is finished or not."""
    output, run_id = _parts(run_uri)
    artifacts = Artifacts(open_store(output, StoreSettings()), run_id)
    record = artifacts.run_record()
    if record is None:
        return RunRow(run_id=run_id, recipe={}, report=None, standing="not there")
    content, attempts = artifacts.read_report(), artifacts.attempts()
    objects = recorded_objects(record)
    return RunRow(
        run_id=run_id,
        recipe=recipe if isinstance(recipe := record.get("recipe"), dict) else {},
        report=content,
        standing="finished" if content is not None else f"not finished: {_standing(artifacts)}",
        begun=attempts[0].get("started") if attempts else None,
        seconds=_seconds(attempts),
        objects=len(objects),
        bytes=sum(each.size for each in objects),
    )


def _seconds(attempts: Sequence[Mapping[str, Any]]) -> float | None:
    """That the attempts took, as far as they left word of their end; None: none did."""
    took = []
    for attempt in attempts:
        began, ended = _moment(attempt.get("started")), _moment((attempt["end"] or {}).get("ended"))
        if began is not None and ended is not None:
            took.append((ended - began).total_seconds())
    return sum(took) if took else None


def _moment(text: str | None) -> datetime | None:
    """In UTC unless it says otherwise; None: it is none."""
    try:
        moment = None if text is None else datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)


def unfinished(rows: Sequence[RunRow]) -> NotFoundError | None:
    """The failure that the table stands for, if a run in it has no report."""
    missing = [row.run_id for row in rows if row.report is None]
    if not missing:
        return None
    return NotFoundError(f"no report of {', '.join(missing)}", action="see in the table how far each of them is")


def _standing(artifacts: Artifacts) -> str:
    committed = artifacts.checkpoints()
    words = [f"step {committed[-1].step} is committed" if committed else "nothing is committed"]
    attempts = artifacts.attempts()
    if attempts:
        last = attempts[-1]
        words.append(f"attempt {last['number']}: {_ended(last['end'])}")
    return ", ".join(words)


def _ended(end: Mapping[str, Any] | None) -> str:
    if end is None:
        return "at work, or killed"
    code = end.get("exit_code")
    return "killed" if code is None else f"exit {code}"


def _output(name: str) -> str | None:
    """The output that a name means as a whole; None: it means a run, a pattern or a file."""
    if "://" not in name and Path(name).is_file():
        return None
    whole = name.rstrip("/")
    if whole.endswith("/runs"):
        return whole.removesuffix("/runs")
    if "/runs/" in whole or (set(whole) & set("*?[")):
        return None
    try:
        store = open_store(whole, StoreSettings())
    except UsageError:
        return None
    has_any = any(True for folder in ("runs/", "endings/") for _ in store.list(folder))
    return whole if has_any else None


def _endings(output: str) -> Sequence[Ended]:
    return endings.last(open_store(output, StoreSettings()), at_most=_LISTED)


def _parts(run_uri: str) -> tuple[str, str]:
    """The output and the run id."""
    output, marker, run_id = run_uri.rstrip("/").removesuffix("/report.json").rpartition("/runs/")
    if not marker or "/" in run_id:
        raise NotFoundError(
            f"{located(run_uri)}: neither a file nor a run's URI, which looks like s3://bucket/prefix/runs/RUN_ID",
            action="correct the URI or the path",
        )
    return output, run_id


def _report(artifacts: Artifacts, output: str, *, named_by_recipe: bool = False) -> Report:
    content = artifacts.read_report()
    if content is not None:
        return content
    if artifacts.run_record() is not None:
        raise NotFoundError(
            f"{located(artifacts.uri)}: no report.json; the run is not finished yet ({_standing(artifacts)})",
            action="wait for its end, or start it again: `run` with its recipe goes on where it stands",
        )
    finished = _finished(output)
    if named_by_recipe:
        state = "the run is not there: the recipe and its data, as they are now, have not been begun"
        action = "start `run` with the recipe, or ask for `report` of a finished run by its URI"
    else:
        state = "no report.json; the run is not there: what is refused before it begins a run leaves none, and no page"
        action = f"correct the URI, or see with `report {located(output)}` how the last jobs there have ended"
    raise NotFoundError(f"{located(artifacts.uri)}: {state}; {finished}", action=action)


def _finished(output: str) -> str:
    """The finished runs of an output, for a message."""
    try:
        runs = finished_runs(open_store(output, StoreSettings()))
    except JobError as error:
        return f"its finished runs could not be listed ({error})"
    if not runs:
        return f"no run is finished in {located(output)}"
    more = f" and {len(runs) - _LISTED} more" if len(runs) > _LISTED else ""
    return f"finished in {located(output)}: {', '.join(runs[:_LISTED])}{more}"
