"""The trackers' part in an attempt: from its first step to its end; what they leave here goes to the store."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from job.core.errors import LockedError, StopRequestedError
from job.core.reports.report import Report
from job.core.reports.tracked import evaluation_numbers, step_numbers, tracked_figures, tracked_key, tracked_recipe
from job.render.page.finished import report_html
from job.render.page.writing import REPORT_HTML
from job.render.verdict_text import verdict_text
from job.stages.attempt import Attempt
from job.stages.base.loading import Inputs
from job.tune.loop.checkpoint import Progress
from job.tune.loop.track import Tracking
from job.tune.loop.trackers import Conclusion, Ended, TrackedRun, Values
from job.tune.world import LOST

log = structlog.get_logger(__name__)
_SECONDS = 60.0
"""How long a tracker may take to hear the end, ..."""
_HURRIED_SECONDS = 2.0
"""... and where the kill is near, or another process of the run is gone."""


class Tracked:
    """One attempt at a run in its trackers; leaving the block ends it there."""

    def __init__(self, attempt: Attempt, inputs: Inputs) -> None:
        self._attempt = attempt
        self._inputs = inputs
        self._folder = attempt.worker.workdir / "trackers" / inputs.artifacts.run_id
        """Not in the run's own folder, which goes when the run is done."""
        self.tracking = Tracking(
            attempt.worker.recipe.track.trackers, on_failure=self._on_failure, on_beat=attempt.phases.on_beat
        )
        self._begun = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._begun:  # and not concluded
            # Where another process is gone, the launcher ends this one too, and soon.
            hurried = isinstance(error, LOST)
            self._end("stopped" if isinstance(error, StopRequestedError) else "failed", hurried=hurried)
            if not isinstance(error, LockedError):  # then the run is another attempt's to write to
                self._publish()

    def begin(self, progress: Progress) -> None:
        """Open the tracked run, or go on with that of an earlier attempt, from where the attempt goes on."""
        artifacts, recipe = self._inputs.artifacts, self._attempt.worker.recipe
        self._begun = bool(recipe.track.trackers)
        self.tracking.begin(
            TrackedRun(
                key=tracked_key(artifacts.run_id, artifacts.uri),
                name=artifacts.run_id,
                uri=artifacts.uri,
                project=recipe.track.project,
                folder=self._folder / f"a{self._inputs.attempt_number:02d}",
                facts=tracked_recipe(recipe.model_dump(mode="json")),
                history=[*self._history(progress)] if self._begun else [],
            )
        )

    def _history(self, progress: Progress) -> Iterator[Values]:
        """What earlier attempts have made: a tracker may have been away, or its last words lost with the machine."""
        now = time.time()
        made = zip(progress.losses, progress.grad_norms, progress.learning_rates, strict=True)
        steps = {
            step: step_numbers(loss=loss, grad_norm=norm, learning_rate=rate)
            for step, (loss, norm, rate) in enumerate(made, start=1)
        }
        for step in range(progress.step + 1):
            numbers = steps.get(step, {})
            if (judged := progress.evaluations.get(step)) is not None:
                dataset = self._inputs.dataset
                numbers |= evaluation_numbers(judged, dataset.losses_by_source(judged), dataset.losses_by_slice(judged))
            if numbers:
                yield Values(step=step, time=now, numbers=numbers)

    def conclude(self, report: Report) -> None:
        """Send the verdict, the figures and the page of a report that is about to be committed, and end with them."""
        if self._begun:
            page = self._folder / REPORT_HTML
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_bytes(report_html(report))
            conclusion = Conclusion(
                step=max(each.step for each in report.evaluations),
                figures=tracked_figures(report),
                verdict=verdict_text(report),
                page=page,
            )
            self.tracking.conclude(conclusion)
            self._end("finished")
            self._publish()

    def _end(self, ended: Ended, *, hurried: bool = False) -> None:
        self._begun = False
        hurried = hurried or self._attempt.is_kill_near()
        self.tracking.end(ended, seconds=_HURRIED_SECONDS if hurried else _SECONDS)

    def _on_failure(self, reason: str) -> None:
        hidden = self._attempt.hide(reason)
        log.warning("tracking_stopped", reason=hidden)
        self._attempt.notes.append(hidden)

    def _publish(self) -> None:
        """Bring to the store what trackers left here, that of killed attempts too: this disk may be gone tomorrow."""
        files = {
            name: path
            for place in sorted(self._folder.glob("a*"))
            for path in sorted(place.rglob("*"))
            if path.is_file() and (name := _stored_name(path.relative_to(place), attempt=place.name)) is not None
        }
        with self._attempt.not_at_the_cost_of_the_run("what trackers left"):
            self._inputs.artifacts.publish_tracked(files)
            shutil.rmtree(self._folder, ignore_errors=True)


def _stored_name(path: Path, *, attempt: str) -> str | None:
    """Where a file of an attempt goes; None: it is nobody's but this machine's.

    TensorBoard takes what lies in one folder for one run, in the order of the names. What W&B wrote online it has sent.
    """
    if path.parts[0] == "tensorboard" and "tfevents" in path.name:
        return f"tensorboard/{attempt}.{path.name}"
    if path.parts[0] == "wandb" and path.parts[1].startswith("offline-run-") and path.parts[2] != "logs":
        return "/".join(("wandb", attempt, *path.parts[1:]))
    return None
