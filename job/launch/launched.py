"""Both ends of a launcher: its supervisor's, who signals and kills the workers; and a worker's, who ends with it."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from job.core.attempt.seat import Seat, take_seat
from job.edge.host.interrupt import kept_from_children

_LOOK_SECONDS = 0.25
_PID = "pid-r{:02d}"
LOG = "launcher.log"
"""What launcher and workers say beside the log."""


class Launched:
    """A launcher, and the workers that it has begun, each of which leads a session of its own."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> None:
        """Start it, away from our terminal: whoever asks us to stop asks the workers through us.

        Args:
            command: word by word.
            environment: all of it.
            folder: where workers leave word of themselves.
        """
        self._folder = folder
        # Some schedulers signal every process of a job, and a launcher that is asked to stop kills its workers.
        with kept_from_children(), (folder / LOG).open("ab") as said:
            self._child = subprocess.Popen(  # noqa: S603 - our own interpreter
                command, env=dict(environment), stdin=subprocess.DEVNULL, stderr=said, start_new_session=True
            )
        self._handles: dict[int, int] = {}
        """Rank -> a handle of its process, which no other process can get; kept after its end."""
        self._pids: dict[int, int] = {}
        self._signalled: set[int] = set()

    @property
    def runs(self) -> bool:
        """Whether the launcher is still there: it waits for its workers."""
        return self._child.poll() is None

    @property
    def code(self) -> int | None:
        """The launcher's own exit code."""
        return self._child.poll()

    @property
    def has_begun(self) -> bool:
        """Whether a worker has come."""
        return bool(self._pids)

    @property
    def works(self) -> bool:
        """Whether a worker is still there."""
        return any(not self.has_ended(rank) for rank in self._pids)

    def look(self) -> None:
        """See which workers have come."""
        for path in self._folder.glob(_PID.format(0).replace("00", "*")):
            rank = int(path.name.rpartition("r")[2])
            if rank not in self._pids and (said := path.read_text()):
                self._pids[rank] = int(said)
                with contextlib.suppress(ProcessLookupError):
                    self._handles[rank] = os.pidfd_open(int(said))

    def has_ended(self, rank: int) -> bool:
        """Whether a worker that had come is gone."""
        if rank not in self._pids:
            return False
        return rank not in self._handles or bool(select.select([self._handles[rank]], [], [], 0)[0])

    def stop(self, name: str | None) -> None:
        """Hand a signal on to each worker, once; also to those that come later, when it is called again."""
        number = signal.Signals.__members__.get(name or "", signal.SIGTERM)
        for rank in self._pids:
            if rank not in self._signalled:
                self._signalled.add(rank)
                self._send(rank, number)

    def kill(self) -> set[int]:
        """End whatever is left, with all that it has started; returns the ranks that were."""
        self.look()
        left = {rank for rank in self._pids if not self.has_ended(rank)}
        if self.runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        for rank in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._pids[rank], signal.SIGKILL)
            self._send(rank, signal.SIGKILL)
        self._child.wait()
        for rank in left:
            select.select([self._handles[rank]], [], [], 10.0)
        return left

    def _send(self, rank: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, KeyError):
            signal.pidfd_send_signal(self._handles[rank], number)


def sit_down(environment: MutableMapping[str, str]) -> Seat | None:
    """Take the seat that the environment gives us, leave word of our process, and end when its supervisor does."""
    seat = take_seat(environment)
    if seat is not None:
        beside = Path(seat.folder, f".{_PID.format(seat.rank)}")
        beside.write_text(str(os.getpid()))
        beside.replace(Path(seat.folder, _PID.format(seat.rank)))
        threading.Thread(target=_end_with, args=(seat.supervisor,), name="supervisor", daemon=True).start()
    return seat


def leave(code: int) -> None:
    """End this worker at once: libraries that take leave of a process that is gone, or frozen, would hold it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _end_with(supervisor: int) -> None:
    """Without it nobody would hear of us, and the next attempt takes us for dead: we are, as if killed with it."""
    while True:
        try:
            os.kill(supervisor, 0)
        except ProcessLookupError:
            os._exit(128 + signal.SIGKILL)
        time.sleep(_LOOK_SECONDS)
