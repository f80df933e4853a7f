"""After the report: the adapter, its card, page and report on the hub, where a recipe asks for that.

The run is done without it. What could not be pushed ends this attempt with the table's code, and the next start of the
same job finds the run done and pushes.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path

import structlog

from job.core.errors import DeniedError, JobError, StopRequestedError, UnavailableError
from job.core.reports.report import Report
from job.edge.pushing import HubRepository
from job.edge.run.artifacts import Artifacts
from job.edge.store.folder import FileEntry
from job.stages.attempt import Attempt, Phases, Worker

log = structlog.get_logger(__name__)
_CARD, _REPORT = "README.md", "report.json"
_TEXTS = (".json", ".jinja", ".html", ".md", ".txt")


def hub_of(worker: Worker, phases: Phases) -> HubRepository | None:
    """The repository that the recipe names; None: it names none."""
    name = worker.recipe.output_hub
    if name is None:
        return None
    return HubRepository(name=name, token=worker.hub_token, should_stop=worker.should_stop, on_beat=phases.on_beat)


def refuse_unpushable(attempt: Attempt) -> None:
    """Look before the GPU works whether the hub would take it; a hub that is away may be back by then.

    Raises:
        DeniedError: no token, or one that may not.
        UsageError: the hub is not to be spoken to.
    """
    hub = hub_of(attempt.worker, attempt.phases)
    if hub is not None:
        with attempt.phases.phase("look_at_hub"):
            try:
                log.info("hub", repository=hub.name, account=hub.look())
            except UnavailableError as error:
                log.warning("hub_not_reached", reason=attempt.hide(str(error)))


def push(attempt: Attempt, artifacts: Artifacts, report: Report) -> Report:
    """Push what stands in the store, where the recipe asks for it and it was not done; returns the report.

    Raises:
        JobError: it could not be pushed; the report stands all the same, and its message says so.
    """
    hub = hub_of(attempt.worker, attempt.phases)
    if hub is None:
        return report
    if artifacts.is_pushed(repository=hub.name, finished=report.finished):
        log.info("already_pushed", repository=hub.name)
        return report
    attempt.runs_at(artifacts.uri)
    attempt.worker.workdir.mkdir(parents=True, exist_ok=True)
    try:
        with (
            attempt.phases.phase("push"),
            tempfile.TemporaryDirectory(dir=attempt.worker.workdir, prefix="push-") as folder,
        ):
            files = _gathered(attempt, artifacts, report, Path(folder))
            pushed = hub.push(files, message=f"Run {report.run_id}, step {report.sweet_spot.step}")
            artifacts.note_pushed({**asdict(pushed), "finished": report.finished})
    except StopRequestedError:
        raise
    except JobError as error:
        error.args = (f"the run is done and its report stands at {artifacts.uri}, but {error}",)
        raise
    log.info("pushed", **asdict(pushed))
    return report


def _gathered(attempt: Attempt, artifacts: Artifacts, report: Report, folder: Path) -> dict[str, Path]:
    """The adapter's files as the report names them, and what people read."""
    # Here and not above: a finished run that is pushed already answers without it.
    from job.render.cards.adapter import adapter_card
    from job.render.page.finished import report_html
    from job.render.page.writing import REPORT_HTML

    entries = {name: FileEntry(size=f.size, sha256=f.sha256) for name, f in report.adapter.files.items()}
    artifacts.fetch_adapter(folder, entries, should_stop=attempt.worker.should_stop)
    if _CARD not in entries:  # the store refused it
        (folder / _CARD).write_text(adapter_card(report), encoding="utf-8")
    (folder / REPORT_HTML).write_bytes(report_html(report))
    (folder / _REPORT).write_bytes(report.model_dump_json(indent=2).encode() + b"\n")
    files = {path.name: path for path in sorted(folder.iterdir())}
    for name, path in files.items():
        if name.endswith(_TEXTS):
            text = path.read_text(encoding="utf-8")
            if attempt.hide(text) != text:
                raise DeniedError(
                    f"output_hub: {name} holds the value of a secret of this environment and is not pushed; look for "
                    "it in the recipe and in the data"
                )
    return files
