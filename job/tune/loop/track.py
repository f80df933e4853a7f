"""Trackers that follow the run, through accelerate; one tracked run over all attempts."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from job.core.errors import UsageError
from job.core.recipe import TrackSection


def refuse_trackers(track: TrackSection) -> None:
    """Look for the trackers' packages before anything begins.

    Raises:
        UsageError: one is not installed.
    """
    missing = set(track.trackers) - {str(getattr(t, "value", t)) for t in get_available_trackers()}
    if missing:
        names = ", ".join(sorted(missing))
        raise UsageError(f"track.trackers: {names} is not installed here; add the package to the image, or remove it")


def make_accelerator(track: TrackSection, *, on_cpu: bool, folder: Path) -> Accelerator:
    """Accelerate, with the recipe's trackers."""
    return Accelerator(cpu=on_cpu, log_with=list(track.trackers) or None, project_dir=str(folder))


class Tracking:
    """Sends numbers to the trackers; the first failure is reported once and ends tracking, never the run."""

    def __init__(self, accelerator: Accelerator, track: TrackSection, *, on_failure: Callable[[str], None]) -> None:
        self._accelerator = accelerator
        self._track = track
        self._on_failure = on_failure
        self._on = bool(track.trackers)

    def begin(self, *, run_id: str, folder: Path, facts: Mapping[str, Any]) -> None:
        """Open the tracked run, or continue that of an earlier attempt."""
        self._attempt(lambda: self._open(run_id, folder, facts))

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Send the numbers of one step."""
        self._attempt(lambda: self._accelerator.log(dict(values), step=step))

    def end(self) -> None:
        """Let the trackers finish sending."""
        self._attempt(self._finish)

    def _finish(self) -> None:
        """Not by accelerate's `end_training`, which also ends the group of processes that train together."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def _open(self, run_id: str, folder: Path, facts: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, dict[str, Any]] = {}
        if "wandb" in self._track.trackers:
            # Its own folder: the current one may be read-only. Silent: its lines would stand between our events.
            options["wandb"] = {
                "id": run_id,
                "name": run_id,
                "resume": "allow",
                "dir": str(folder),
                "settings": {"silent": True},
            }
        if "mlflow" in self._track.trackers:
            options["mlflow"] = {"run_name": run_id, "run_id": _mlflow_run(self._track.project, run_id)}
        self._accelerator.init_trackers(self._track.project, config=dict(facts), init_kwargs=options)

    def _attempt(self, action: Callable[[], None]) -> None:
        if not self._on:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 - trackers raise anything; none of it may cost a night of training
            self._on = False
            with suppress(Exception):
                self._finish()
            self._on_failure(f"tracking stopped: {type(error).__name__}: {error}")


def _mlflow_run(experiment: str, run_id: str) -> str | None:
    """Id of the run of an earlier attempt, found by its name: MLflow chooses ids itself."""
    import mlflow

    runs = mlflow.search_runs(
        experiment_names=[experiment],
        filter_string=f"attributes.run_name = '{run_id}'",
        max_results=1,
        output_format="list",
    )
    return str(runs[0].info.run_id) if runs else None
