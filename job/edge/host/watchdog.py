"""A thread that ends a process in which nothing moves, or which does not hear that it shall stop."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass

from job.core.attempt.stall import Deaf, Stalled, Vigil
from job.core.errors import StalledError, StopRequestedError

REPORT_SECONDS = 5.0
"""How long reporting may take: the log, the outcome file, a record in the store, which may be what hangs."""
_PAUSE_SECONDS = 0.2
_LEAST_REPORT_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """What the watchdog knows of requests to stop."""

    asked: Callable[[], bool]
    """Looked at five times a second."""
    grace_seconds: float
    """From the request to the kill; the process ends by itself just before. Infinite: nobody knows when that is."""
    deaf_phases: frozenset[str]
    """Phases that cannot look at the request: ended soon after it."""
    on_deaf: Callable[[str], int | None]
    """Called with the phase before the process ends with the exit code that it returns, or 75."""


class Watchdog:
    """Watches beats and phases from a thread of its own.

    It sees what Python can see: a C call that never gives the interpreter back stops this thread as well.
    """

    def __init__(
        self,
        *,
        allowed_seconds: Callable[[str], float],
        on_stalled: Callable[[str, float, str], int | None],
        stopping: Stopping | None = None,
        on_reported: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        end_process: Callable[[int], None] = os._exit,
        pause_seconds: float = _PAUSE_SECONDS,
        report_seconds: float = REPORT_SECONDS,
    ) -> None:
        """Make one that is not started yet.

        Args:
            allowed_seconds: phase -> how long it may be silent; asked at each look.
            on_stalled: called with phase, seconds of silence and the stacks of all threads, before the process ends
                with the exit code that it returns, or 83.
            stopping: None: nobody asks to stop.
            on_reported: called once the exit code is known and reported: whatever it does may hang without changing it.
            clock: seconds that never go back.
            end_process: ends it at once, without cleaning up: whatever hangs would hang that too.
            pause_seconds: between two looks.
            report_seconds: after which the process ends although reporting has not.
        """
        self._allowed_seconds = allowed_seconds
        self._on_stalled = on_stalled
        self._stopping = stopping
        self._on_reported = on_reported
        self._clock = clock
        self._end_process = end_process
        self._pause_seconds = pause_seconds
        self._report_seconds = report_seconds
        self._phase = "start"
        self._moved = False
        self._code: int | None = None
        """The exit code that `on_stalled` or `on_deaf` returned."""
        self._stopped = threading.Event()
        # A daemon: the interpreter must not wait for it.
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer: after it nothing fires. While a report is already under way, the process ends in here."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """Something moved. Costs nothing: call it for each step, micro-batch, file and part."""
        self._moved = True

    def phase(self, name: str) -> str:
        """Enter a phase, which is a beat too; returns the one before, to go back to."""
        before, self._phase = self._phase, name
        self._moved = True
        return before

    def _watch(self) -> None:
        stopping = self._stopping
        vigil = Vigil(
            self._clock(),
            pause_seconds=self._pause_seconds,
            allowed_seconds=self._allowed_seconds,
            grace_seconds=stopping.grace_seconds if stopping else 0.0,
            deaf_phases=stopping.deaf_phases if stopping else (),
        )
        while not self._stopped.wait(self._pause_seconds):
            moved, self._moved = self._moved, False
            asked = stopping is not None and stopping.asked()
            found = vigil.look(self._clock(), phase=self._phase, moved=moved, asked=asked)
            if found is not None and not self._stopped.is_set():
                self._end(found)
                return

    def _end(self, found: Stalled | Deaf) -> None:
        """Report, for a bounded time, and end the process."""
        seconds = self._report_seconds
        if isinstance(found, Deaf):
            # Beyond the grace the kill comes, and after a 137 nobody starts the job again.
            seconds = max(_LEAST_REPORT_SECONDS, min(seconds, 0.8 * found.left_seconds))
        reporter = threading.Thread(target=self._report, args=(found,), name="watchdog-reports", daemon=True)
        reporter.start()
        reporter.join(seconds)
        usual = StalledError.code if isinstance(found, Stalled) else StopRequestedError.code
        self._end_process(usual if self._code is None else self._code)

    def _report(self, found: Stalled | Deaf) -> None:
        if isinstance(found, Stalled):
            # In this thread, for it reads source files, and the disk may be what hangs.
            self._code = self._on_stalled(
                found.phase, found.seconds, stacks(leave_out=(self._thread, threading.current_thread()))
            )
        elif self._stopping is not None:
            self._code = self._stopping.on_deaf(found.phase)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed: nobody reads it
                stream.flush()
        self._on_reported()


def stacks(*, leave_out: Collection[threading.Thread] = ()) -> str:
    """Where each thread stands in this moment, with its name; a thread in C shows the line that called it."""
    threads = {thread.ident: thread for thread in threading.enumerate()}
    shown = []
    for ident, frame in sys._current_frames().items():  # noqa: SLF001 - the documented way, despite its name
        thread = threads.get(ident)
        if thread is None or thread not in leave_out:
            name = thread.name if thread else "not Python's own"
            shown.append(f"Thread {name!r}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(shown)
