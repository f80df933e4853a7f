"""Merges the adapter of a finished run into its base, proves the result, and writes it where it is asked for."""

from collections.abc import Callable
from pathlib import Path

import structlog

from job.commands.report import open_run, recipe_of
from job.core.reports.export import Export
from job.core.reports.onto import Onto
from job.edge.exports import ExportPlace
from job.edge.host.logs import bind, quiet_libraries
from job.edge.host.planted import refuse_planted
from job.edge.store.objects import StoreSettings
from job.stages.attempt import Phases, Worker

log = structlog.get_logger(__name__)


def export(
    run_uri: str,
    to: str,
    *,
    onto: Onto,
    proof_examples: int | None,
    workdir: Path,
    device: str,
    phases: Phases,
    should_stop: Callable[[], bool],
) -> tuple[Export, str]:
    """Carry an export to its end, or find that it is there already.

    Args:
        run_uri: of a finished run.
        to: a local folder, or s3://bucket/folder.
        onto: on what the adapter is merged.
        proof_examples: held-out examples that the proof is on; None: all.
        workdir: where base and data are kept.
        device: `auto`, `cuda` or `cpu`.
        phases: the clock.
        should_stop: polled in every long loop.

    Returns:
        What was exported, and where it stands.
    """
    refuse_planted(workdir)
    artifacts, report = open_run(run_uri)
    bind(run_id=report.run_id)
    recipe = recipe_of(report)
    settings = StoreSettings(sse_kms_key=recipe.store.sse_kms_key, checksums=recipe.store.checksums)
    place = ExportPlace(to, settings, workdir=workdir, should_stop=should_stop)
    worker = Worker(recipe=recipe, workdir=workdir, device=device, engine="auto", should_stop=should_stop)
    with phases.phase("load_libraries"):
        from job.stages.finishing.exporting import Finished, export_run

        quiet_libraries()
    run = Finished(artifacts=artifacts, report=report, recipe=recipe)
    found = export_run(run, worker, place, phases, onto=onto, most_examples=proof_examples)
    losses = found.losses
    log.info(
        "exported",
        to=place.uri,
        onto=found.onto,
        merged_loss=round(losses.merged, 6),
        unmerged_loss=round(losses.unmerged, 6),
        reported_loss=round(losses.reported, 6),
    )
    return found, place.uri
