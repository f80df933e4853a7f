"""Trackers that follow the run, through accelerate; one tracked run over all attempts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from job.core.errors import UsageError
from job.core.recipe import TrackSection


def make_accelerator(track: TrackSection, *, on_cpu: bool, folder: Path) -> Accelerator:
    """Accelerate, with the recipe's trackers.

    Raises:
        UsageError: a tracker's package is not installed.
    """
    from accelerate.tracking import get_available_trackers

    missing = set(track.trackers) - {str(getattr(t, "value", t)) for t in get_available_trackers()}
    if missing:
        names = ", ".join(sorted(missing))
        raise UsageError(f"track.trackers: {names} is not installed here; add the package to the image, or remove it")
    return Accelerator(cpu=on_cpu, log_with=list(track.trackers) or None, project_dir=str(folder))


def begin_tracking(accelerator: Accelerator, track: TrackSection, *, run_id: str, facts: Mapping[str, Any]) -> None:
    """Open the tracked run, or go on with the one of an earlier attempt."""
    if not track.trackers:
        return
    options: dict[str, dict[str, Any]] = {}
    if "wandb" in track.trackers:
        options["wandb"] = {"id": run_id, "name": run_id, "resume": "allow"}
    if "mlflow" in track.trackers:
        options["mlflow"] = {"run_name": run_id, "run_id": _mlflow_run(track.project, run_id)}
    project = f"{track.project}/{run_id}" if track.trackers == ("tensorboard",) else track.project
    accelerator.init_trackers(project, config=dict(facts), init_kwargs=options)


def _mlflow_run(experiment: str, run_id: str) -> str | None:
    """MLflow gives its own ids: the run of an earlier attempt is found by its name."""
    import mlflow

    found = mlflow.search_runs(
        experiment_names=[experiment],
        filter_string=f"attributes.run_name = '{run_id}'",
        max_results=1,
        output_format="list",
    )
    return str(found[0].info.run_id) if found else None
