"""Uploads checkpoints in the background: bounded, in order, and no failure is ever lost."""

import contextvars
import queue
import shutil
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import structlog

from job.edge.artifacts import Artifacts, Checkpoint

log = structlog.get_logger(__name__)

_WAITING = 1
"""Checkpoints that wait while one is sent; the next one makes the training wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parcel:
    folder: Path
    checkpoint: Checkpoint
    candidates: Collection[int]


class Publisher:
    """One thread that commits checkpoints and then clears what is no longer needed."""

    def __init__(self, artifacts: Artifacts, *, keep: int, on_committed: Callable[[Checkpoint], None]) -> None:
        self._artifacts = artifacts
        self._keep = keep
        self._on_committed = on_committed
        self._parcels: queue.Queue[_Parcel | None] = queue.Queue(maxsize=_WAITING)
        self._failure: BaseException | None = None
        # Not a daemon: the interpreter must not end under an upload.
        context = contextvars.copy_context()  # its events carry the run and the attempt too
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="publisher")
        self._thread.start()

    def submit(self, folder: Path, checkpoint: Checkpoint, *, candidates: Collection[int]) -> None:
        """Hand over a folder; it is deleted once it is committed.

        Args:
            folder: the whole checkpoint.
            checkpoint: its step and attempt.
            candidates: steps that may become the chosen one; their checkpoints stay.

        Raises:
            JobError: an earlier upload failed for good.
        """
        self._raise_failure()
        self._parcels.put(_Parcel(folder=folder, checkpoint=checkpoint, candidates=candidates))

    def close(self) -> None:
        """Wait until everything is committed.

        Raises:
            JobError: an upload failed for good.
        """
        if self._thread.is_alive():
            self._parcels.put(None)
            self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (parcel := self._parcels.get()) is not None:
            if self._failure is None:
                try:
                    self._send(parcel)
                except BaseException as error:  # noqa: BLE001 - raised again on the main thread
                    self._failure = error

    def _send(self, parcel: _Parcel) -> None:
        self._artifacts.publish_checkpoint(parcel.folder, parcel.checkpoint)
        self._on_committed(parcel.checkpoint)
        shutil.rmtree(parcel.folder, ignore_errors=True)
        self._artifacts.retain(parcel.candidates, newest=self._keep)
