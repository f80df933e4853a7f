"""Uploads checkpoints in the background: bounded, in order, and no failure is ever lost."""

import contextvars
import queue
import shutil
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import structlog

from job.core.errors import DeniedError, JobError, SickDeviceError, UnavailableError
from job.edge.run.artifacts import Artifacts
from job.edge.run.checkpoints import Checkpoint

log = structlog.get_logger(__name__)
_AWAY = (UnavailableError, SickDeviceError)
"""What passes while nothing is lost: the store comes back, and a clock that differs from its own is set."""
_PATIENCE_SECONDS = 1800.0
"""How long one checkpoint waits for a store that is away, beside the patience of each request."""
_HELD_UP_SECONDS = 300.0
"""The same once training waits as well: a GPU that idles is dearer than a new start."""
_PAUSE_SECONDS = 5.0
_WAITING = 1
"""Checkpoints that wait while one is sent; the next one makes the training wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parcel:
    folder: Path
    checkpoint: Checkpoint
    candidates: Collection[int]


class Publisher:
    """One thread that commits checkpoints and then clears what is no longer needed."""

    def __init__(
        self,
        artifacts: Artifacts,
        *,
        keep: int,
        on_committed: Callable[[Checkpoint, float], None],
        should_stop: Callable[[], bool],
        on_note: Callable[[str], None] = lambda _: None,
        on_beat: Callable[[], None] = lambda: None,
        pause_seconds: float = _PAUSE_SECONDS,
    ) -> None:
        """Start the thread.

        Args:
            artifacts: the run.
            keep: newest checkpoints that stay.
            on_committed: called with each one, and the seconds from its first byte to its manifest.
            on_note: gets what the report's reader should know.
            on_beat: called when something moves, waiting for the store included.
            should_stop: after it a store that is away is not waited for any longer.
            pause_seconds: between two tries with such a store.
        """
        self._artifacts = artifacts
        self._keep = keep
        self._on_committed = on_committed
        self._should_stop = should_stop
        self._on_note = on_note
        self._on_beat = on_beat
        self._pause_seconds = pause_seconds
        self._under_way = 0
        self._held_up_since: float | None = None
        """Since when training waits for room in the queue."""
        self._parcels: queue.Queue[_Parcel | None] = queue.Queue(maxsize=_WAITING)
        self._may_delete = True
        """Until the store says otherwise, which is said once."""
        self._failure: BaseException | None = None
        self._closing = False
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
        self._under_way += 1
        self._held_up_since = time.monotonic()
        self._parcels.put(_Parcel(folder=folder, checkpoint=checkpoint, candidates=candidates))
        self._held_up_since = None

    @property
    def under_way(self) -> int:
        """Checkpoints that are handed over and not committed yet."""
        return self._under_way

    def close(self) -> None:
        """Wait until everything is committed.

        Raises:
            JobError: an upload failed for good.
        """
        if self._thread.is_alive():
            self._closing = True
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
        began = time.monotonic()
        try:
            self._commit(parcel, began)
        except JobError as error:
            where = f"the checkpoint of step {parcel.checkpoint.step} is kept in {parcel.folder}"
            raise type(error)(f"{error}; {where}", action=error.action) from error
        self._under_way -= 1
        self._on_committed(parcel.checkpoint, time.monotonic() - began)
        shutil.rmtree(parcel.folder, ignore_errors=True)
        if self._may_delete:
            self._clear(parcel.candidates)

    def _clear(self, candidates: Collection[int]) -> None:
        """What stays longer than it should costs room, and never the run."""
        try:
            self._artifacts.retain(candidates, newest=self._keep)
        except _AWAY as error:
            log.warning("old_checkpoints_wait", reason=str(error), then="the next commit clears them")
        except DeniedError as error:
            self._may_delete = False
            log.warning("old_checkpoints_stay", reason=str(error))
            self._on_note(f"old checkpoints stay in the store: {error}")

    def _commit(self, parcel: _Parcel, began: float) -> None:
        """Training needs the store only for this: while it can go on, a store that is away is waited for."""
        while True:
            try:
                self._artifacts.publish_checkpoint(parcel.folder, parcel.checkpoint)
            except _AWAY as error:
                if self._should_stop() or self._closing or self._has_waited_enough(began):
                    raise
                self._on_beat()
                log.warning("checkpoint_waits", step=parcel.checkpoint.step, reason=str(error))
                time.sleep(self._pause_seconds)
            else:
                return

    def _has_waited_enough(self, began: float) -> bool:
        now, held_up_since = time.monotonic(), self._held_up_since
        held_up = held_up_since is not None and now - held_up_since > _HELD_UP_SECONDS
        return held_up or now - began > _PATIENCE_SECONDS
