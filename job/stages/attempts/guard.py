"""Watches over an attempt: nothing moves, a request to stop is not heard, the deadline is near."""

import contextvars
import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import structlog

from job.core.attempt.stall import allowed_seconds
from job.core.errors import StalledError, StopRequestedError
from job.edge.host.watchdog import Stopping, Watchdog
from job.stages.attempt import Attempt

log = structlog.get_logger(__name__)

OnEnd = Callable[[BaseException], None]
"""Gets how the attempt ended."""
_DEAF_PHASES = frozenset({"load_libraries", "load_model", "self_test", "compile"})
"""One call into a library each, with nothing to save: a request is answered for them."""
_LOG_SECONDS = 5.0
"""How long the outcome file waits for the log: a reader that reads takes milliseconds."""


class Guard:
    """A thread beside the attempt; it ends the process where the attempt itself cannot."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self.explain: Callable[[BaseException], BaseException] = lambda error: error
        """What an end means once the lock and the earlier attempts are looked at."""
        self.end_records: OnEnd = lambda _: None
        """Leaves word in the store; nothing before there is a run to leave it with."""
        self._ended: BaseException | None = None
        grace = attempt.grace_seconds
        self._watchdog = Watchdog(
            allowed_seconds=self._allowed,
            on_stalled=self._stalled,
            on_reported=self._leave_word,
            stopping=Stopping(
                asked=self._asked,
                # Nobody said when the kill comes: then what is under way may take its time.
                grace_seconds=math.inf if grace is None else grace,
                deaf_phases=_DEAF_PHASES,
                on_deaf=self._deaf,
            ),
        )

    def __enter__(self) -> Self:
        phases = self._attempt.phases
        phases.on_phase, phases.on_beat = self._watchdog.phase, self._watchdog.beat
        self._watchdog.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._watchdog.stop()

    def _allowed(self, phase: str) -> float:
        longest = max(self._attempt.limits.cost.steps, default=None)
        return allowed_seconds(phase, longest_step_seconds=longest, override=self._attempt.stall_seconds)

    def _asked(self) -> bool:
        """Whether a signal asked: what the attempt asks of itself has no grace to keep within."""
        attempt = self._attempt
        if attempt.is_kill_near():
            attempt.standing.asked_at = attempt.standing.asked_at or time.monotonic()
            return True
        if attempt.limits.must_stop(time.monotonic()):
            attempt.ask_to_stop("the deadline is near")
        return False

    def _stalled(self, phase: str, seconds: float, stacks: str) -> int:
        facts = {"name": phase, "seconds": round(seconds, 1), "stacks": stacks}
        # It may be the log that hangs, unread, and the outcome file is to say so all the same.
        logger = threading.Thread(
            target=contextvars.copy_context().run, args=(log.error, "stalled"), kwargs=facts, daemon=True
        )
        logger.start()
        logger.join(_LOG_SECONDS)
        return self._end(
            StalledError(
                f"nothing moved for {seconds:.0f} s in phase {phase}; the stacks of all threads are in the log. Look "
                "at the store, the disk and the GPU, then start the same job again"
            )
        )

    def _deaf(self, phase: str) -> int:
        committed = self._attempt.standing.last_committed_step
        what = "nothing was committed yet" if committed is None else f"step {committed} is committed"
        return self._end(StopRequestedError(f"asked to stop in phase {phase}, which had to be broken off; {what}"))

    def _end(self, error: StalledError | StopRequestedError) -> int:
        self._ended = self.explain(error)
        return self._attempt.report_end(self._ended)

    def _leave_word(self) -> None:
        """In the store, and so last: it may be what hangs."""
        if self._ended is None:
            return
        # Beside each other, for there is little time, and one may hang where the other does not.
        aside = threading.Thread(
            target=contextvars.copy_context().run, args=(self._attempt.leave_word, self._ended), daemon=True
        )
        aside.start()
        self.end_records(self._ended)
        aside.join()


def refuse_short_time(attempt: Attempt) -> None:
    """Look whether the time left is worth beginning with.

    Raises:
        StopRequestedError: the deadline is too near; the next attempt may have more time.
    """
    limits, now = attempt.limits, time.monotonic()
    if limits.deadline is not None and not limits.enough_time(now):
        raise StopRequestedError(
            f"{max(0.0, limits.deadline - now):.0f} s are left until the deadline, too little to begin with; "
            "give the job more time"
        )
