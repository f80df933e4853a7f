"""Commits the state of a run: saved here, uploaded in the background, and as often as clock and grace ask for."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog
from safetensors import SafetensorError

from job.core.crash_points import crash_point
from job.core.errors import LocalDiskError
from job.core.judging.verdict import judge
from job.edge.run.artifacts import Artifacts
from job.edge.run.checkpoints import Checkpoint
from job.edge.run.publisher import Publisher
from job.stages.attempt import Attempt
from job.tune.loop import checkpoint as checkpoints
from job.tune.loop.checkpoint import State

log = structlog.get_logger(__name__)


class Committer:
    """One attempt's checkpoints. What is handed over is uploaded whatever happens: leaving the block waits for it."""

    def __init__(self, attempt: Attempt, artifacts: Artifacts, state: State, *, number: int, scratch: Path) -> None:
        """Start the thread that uploads.

        Args:
            attempt: its limits and what it reports to.
            artifacts: the run.
            state: what is committed.
            number: of the attempt.
            scratch: this attempt's folder for checkpoints on their way; those of earlier ones stand beside it.
        """
        self._attempt = attempt
        self._state = state
        self._number = number
        self._scratch = scratch
        self._earlier = [path for path in scratch.parent.glob("*") if path != scratch]
        """What earlier attempts could not upload: kept until there is something newer in the store."""
        self._committed = self._now()
        self._committed_at = self._looked_at = time.monotonic()
        self._longest_micro_batch = 0.0
        """Seconds."""
        self._warned = False
        self._publisher = Publisher(
            artifacts,
            keep=attempt.worker.recipe.checkpoint.keep,
            on_committed=self._on_committed,
            should_stop=attempt.worker.should_stop,
            on_note=lambda note: attempt.notes.append(attempt.hide(note)),
            on_beat=attempt.phases.on_beat,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._attempt.phases.phase("upload"):
            self._publisher.close()

    def _now(self) -> tuple[int, int]:
        """What a checkpoint would add: a step, or an evaluation."""
        return self._state.progress.step, len(self._state.progress.evaluations)

    @property
    def has_nothing(self) -> bool:
        """Whether there is nothing to go back to: no step, no evaluation."""
        return self._committed == (0, 0)

    def commit(self) -> None:
        """Save the state as it stands, between two steps, and send it off; again only once it has moved."""
        if self._now() == self._committed:
            return
        checkpoint = Checkpoint(step=self._state.progress.step, attempt=self._number)
        folder = self._scratch / checkpoint.name
        began = time.monotonic()
        _save(self._state, folder)
        crash_point("save.after")
        size = sum(path.stat().st_size for path in folder.iterdir())
        self._attempt.limits.cost.add_save(time.monotonic() - began, size)
        self._publisher.submit(folder, checkpoint, candidates=self._candidates())
        self._committed = self._now()
        self._committed_at = self._looked_at = time.monotonic()
        self._attempt.phases.on_beat()

    def _candidates(self) -> Sequence[int]:
        """Steps that may become the chosen one."""
        judged = self._state.progress.evaluations
        return judge(judged).candidate_steps if judged else ()

    def is_clock_due(self) -> bool:
        """Whether the clock asks for a checkpoint before the recipe does."""
        return self._attempt.limits.checkpoint_due(
            steps_since=self._state.progress.step - self._committed[0],
            seconds_since=time.monotonic() - self._committed_at,
            every_steps=self._attempt.worker.recipe.checkpoint.every_steps,
            uploads_under_way=self._publisher.under_way,
        )

    def must_cut_step(self) -> bool:
        """The look between two micro-batches: whether a stop was asked for, and saving needs what time is left."""
        self._attempt.phases.on_beat()
        before, self._looked_at = self._looked_at, time.monotonic()
        # The first kernels compile; on the GPU the host runs ahead, and only the largest gap is a micro-batch.
        if self._attempt.limits.cost.steps:
            self._longest_micro_batch = max(self._longest_micro_batch, self._looked_at - before)
        return self._attempt.worker.should_stop() and self._attempt.limits.must_cut_step(
            time.monotonic(),
            self._attempt.standing.asked_at,
            uploads_under_way=self._publisher.under_way,
            next_look_seconds=self._longest_micro_batch,
        )

    def _on_committed(self, checkpoint: Checkpoint, seconds: float) -> None:
        """On the thread that uploads."""
        attempt = self._attempt
        attempt.committed(checkpoint.step)
        attempt.phases.on_beat()
        log.info("checkpoint", step=checkpoint.step, name=checkpoint.name, upload_seconds=round(seconds, 3))
        attempt.limits.cost.add_upload(seconds)
        while self._earlier:
            shutil.rmtree(self._earlier.pop(), ignore_errors=True)
        warning = attempt.limits.warning()
        if warning is not None and not self._warned:
            self._warned = True
            log.warning("stop_does_not_fit", reason=warning)
            attempt.notes.append(warning)


def _save(state: State, folder: Path) -> None:
    try:
        checkpoints.save(state, folder)
    except SafetensorError as error:  # its word for what the disk refused
        raise LocalDiskError(
            f"{folder}: the checkpoint cannot be written ({error}); give the work folder more room, "
            "or name another one with --workdir"
        ) from error
