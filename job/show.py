"""The report of a finished run, for people."""

from job.core.errors import DeniedError, LocalDiskError, NotFoundError
from job.core.report import Report
from job.edge.artifacts import Artifacts
from job.edge.plots import draw
from job.edge.storage import StoreSettings, open_store


def open_run(run_uri: str) -> tuple[Artifacts, Report]:
    """A finished run by its URI: {output}/runs/{run_id}, or the report.json in it; with the store settings it had.

    Raises:
        NotFoundError: there is no report.
    """
    uri = run_uri.rstrip("/").removesuffix("/report.json")
    output, marker, run_id = uri.rpartition("/runs/")
    if not marker or "/" in run_id:
        raise NotFoundError(f"{run_uri}: not a run's URI; it looks like s3://bucket/prefix/runs/RUN_ID")
    artifacts = Artifacts(open_store(output, StoreSettings()), run_id)
    content = artifacts.report()
    if content is None:
        state = "not finished yet" if artifacts.run_record() is not None else "not there"
        raise NotFoundError(f"{run_uri}: no report.json; the run is {state}")
    report = Report.model_validate(content)
    settings = StoreSettings(**report.recipe["store"])
    return Artifacts(open_store(output, settings), run_id), report


def leave_pictures(artifacts: Artifacts, report: Report) -> str:
    """Draw the report's pictures beside it, and say where they are; a reader who may not write is told so."""
    pictures = draw(report)
    try:
        for name, picture in pictures.items():
            artifacts.publish(name, picture)
    except (DeniedError, LocalDiskError) as error:
        return f"pictures: not written ({error})"
    return f"pictures: {', '.join(f'{artifacts.uri}/{name}' for name in pictures)}"
