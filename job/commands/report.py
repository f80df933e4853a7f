"""Reports of finished runs, for people: one in full, or several side by side."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from job.core.errors import DeniedError, LocalDiskError, NotFoundError
from job.core.report import Report
from job.edge.run.artifacts import Artifacts, runs_of
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.render.pictures import draw
from job.render.runs_table import RunRow
from job.stages.attempt import Worker
from job.stages.identity import find_run


def open_run(run_uri: str) -> tuple[Artifacts, Report]:
    """A finished run by its URI: {output}/runs/{run_id}, or the report.json in it; with the store settings it had.

    Raises:
        NotFoundError: there is no report.
    """
    output, run_id = _parts(run_uri)
    report = _report(Artifacts(open_store(output, StoreSettings()), run_id), run_uri)
    settings = StoreSettings(**report.recipe["store"])
    return Artifacts(open_store(output, settings), run_id), report


def run_of_recipe(worker: Worker, run_id: str | None) -> tuple[Artifacts, Report]:
    """The finished run that a recipe names now: nothing has changed since it was begun, so `run` would do nothing.

    Raises:
        NotFoundError: `run` would have something to do.
    """
    run = find_run(worker.recipe, run_id=run_id, settings=worker.settings, should_stop=worker.should_stop)
    artifacts = run.artifacts
    return artifacts, _report(artifacts, artifacts.uri)


def leave_pictures(artifacts: Artifacts, report: Report) -> str:
    """Draw the report's pictures beside it, and say where they are, or that the reader may not write there."""
    pictures = draw(report)
    try:
        for name, picture in pictures.items():
            artifacts.publish(name, picture)
    except (DeniedError, LocalDiskError) as error:
        return f"pictures: not written ({error})"
    return f"pictures: {', '.join(f'{artifacts.uri}/{name}' for name in pictures)}"


def run_uris(name: str) -> list[str]:
    """The runs that a name means: those below `{output}/runs`, those that a pattern fits, a file's lines, or itself.

    Raises:
        NotFoundError: it means none.
    """
    if "://" not in name and Path(name).is_file():
        lines = (line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines())
        found = [line for line in lines if line and not line.startswith("#")]
    else:
        whole = name.rstrip("/")
        output, run_id = _parts(f"{whole}/*" if whole.endswith("/runs") else name)
        if not set(run_id) & set("*?["):
            return [name]
        runs = runs_of(open_store(output, StoreSettings()), "")
        found = [run.uri for run in runs if fnmatchcase(run.run_id, run_id)]
    if not found:
        raise NotFoundError(f"{name}: no run is named there")
    return found


def look_at(run_uri: str) -> RunRow:
    """How one run of several stands, whether it is finished or not."""
    output, run_id = _parts(run_uri)
    artifacts = Artifacts(open_store(output, StoreSettings()), run_id)
    record = artifacts.run_record()
    if record is None:
        return RunRow(run_id=run_id, recipe={}, report=None, standing="not there")
    content = artifacts.report()
    return RunRow(
        run_id=run_id,
        recipe=record["recipe"],
        report=None if content is None else Report.model_validate(content),
        standing="finished" if content is not None else f"not finished: {_standing(artifacts)}",
    )


def unfinished(rows: Sequence[RunRow]) -> NotFoundError | None:
    """The failure that the table stands for, if a run in it has no report."""
    missing = [row.run_id for row in rows if row.report is None]
    return NotFoundError(f"no report of {', '.join(missing)}") if missing else None


def _standing(artifacts: Artifacts) -> str:
    committed = artifacts.checkpoints()
    words = [f"step {committed[-1].step} is committed" if committed else "nothing is committed"]
    attempts = artifacts.attempts()
    if attempts:
        last = attempts[-1]
        ended = "at work, or killed" if last["end"] is None else f"exit {last['end']['exit_code']}"
        words.append(f"attempt {last['number']}: {ended}")
    return ", ".join(words)


def _parts(run_uri: str) -> tuple[str, str]:
    """The output and the run id."""
    output, marker, run_id = run_uri.rstrip("/").removesuffix("/report.json").rpartition("/runs/")
    if not marker or "/" in run_id:
        raise NotFoundError(f"{run_uri}: not a run's URI; it looks like s3://bucket/prefix/runs/RUN_ID")
    return output, run_id


def _report(artifacts: Artifacts, name: str) -> Report:
    content = artifacts.report()
    if content is None:
        state = "not finished yet" if artifacts.run_record() is not None else "not there"
        raise NotFoundError(f"{name}: no report.json; the run is {state}")
    return Report.model_validate(content)
