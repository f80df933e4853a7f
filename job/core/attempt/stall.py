"""When a process in which nothing moves, or which does not hear that it shall stop, is to be ended."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import MappingProxyType

LONGEST_LOOK_SECONDS = 1.0
"""No more than this is counted between two looks, beside the pause asked for: the rest of it this process did not run
(SIGSTOP, a paused machine), and so nothing could have moved."""
DEAF_SECONDS = 2.0
"""How long a phase that cannot look at the request may still take to end by itself."""
LAST_SECONDS = 1.0
"""The part of the grace kept for reporting how it ended; a tenth of it where the grace is short."""
DEFAULT_SECONDS = 900.0
"""A phase that the table does not name."""
FIRST_STEP_SECONDS = 1800.0
"""Kernels compile for lengths that they have not seen, and are tuned."""
TIMES_LONGEST_STEP = 20.0
"""How many times the longest step seen is allowed: nothing that still moves is that much slower than itself."""
LEAST_TRAIN_SECONDS = 600.0
ALLOWED_SECONDS = MappingProxyType(
    {
        # Requests to the store, each reported as progress. One is retried for 120 s, a transfer silent for 300 s
        # fails by itself, and the hub is asked for 300 s: 69 says more than 83 and must come first.
        "identify": 600.0,
        "try_output": 600.0,
        "lock": 600.0,
        "download": 600.0,
        # Reported only file by file: half a gigabyte at 0.3 MB/s.
        "upload": 1800.0,
        "publish": 1800.0,
        "push": 1800.0,
        "commit": 1800.0,
        "report": 600.0,
        "look_at_hub": 600.0,
        # As those, and then the files are hashed: ten gigabytes at the 30 MB/s of a bad disk.
        "fetch_base": 900.0,
        "fetch_weights": 900.0,
        "resume": 900.0,
        # A GPU that does not answer within this is broken.
        "preflight": 600.0,
        # Imports from a shared disk that many nodes read in this moment.
        "load_libraries": 900.0,
        # Example by example; one takes milliseconds.
        "encode": 600.0,
        # No progress in between: 140 GB at 50 MB/s take 2800 s. To prove the adapter, the base is loaded again.
        "load_model": 3600.0,
        # Each look at the others is a beat; what stays is becoming a group, and a gigabyte of state.
        "join": 600.0,
        "prove": 3600.0,
        # Layer by layer, each read, multiplied and written.
        "merge": 3600.0,
        # Adapters on their way; loading a model is a phase of its own in them.
        "channel": 1800.0,
        "judge": 1800.0,
        "promote": 1800.0,
        "test_before_training": 1800.0,
        # File by file, and each is sent to the store as well.
        "keep_copy": 900.0,
        # The first kernels compile.
        "self_test": FIRST_STEP_SECONDS,
        "compile": FIRST_STEP_SECONDS,
        # Batch by batch, and the first one compiles.
        "evaluate": FIRST_STEP_SECONDS,
        "ask_base": FIRST_STEP_SECONDS,
        "ask_tuned": FIRST_STEP_SECONDS,
        # Statistics of what both models answered.
        "sum_up": 600.0,
    }
)
"""Seconds without progress by phase; `train` follows its own steps."""


UNLIMITED = frozenset({"follow"})
"""Waiting for another process's orders, and obeying them: that process is watched."""


def allowed_seconds(phase: str, *, longest_step_seconds: float | None, override: float | None = None) -> float:
    """How long a phase may be silent.

    Args:
        phase: its name.
        longest_step_seconds: of this attempt; None before its first step is done.
        override: the operator's own, for all phases.
    """
    if phase in UNLIMITED:
        return math.inf
    if override is not None:
        return override
    if phase == "train":
        if longest_step_seconds is None:
            return FIRST_STEP_SECONDS
        return max(LEAST_TRAIN_SECONDS, TIMES_LONGEST_STEP * longest_step_seconds)
    return ALLOWED_SECONDS.get(phase, DEFAULT_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stalled:
    """Nothing moved for longer than allowed."""

    phase: str
    seconds: float
    """How long nothing moved while the process ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deaf:
    """A stop was asked for, and the phase did not end in time."""

    phase: str
    left_seconds: float
    """Until the grace is used up; not above zero: it is."""


class Vigil:
    """What is known from look to look, and what follows from it."""

    def __init__(
        self,
        now: float,
        *,
        pause_seconds: float,
        allowed_seconds: Callable[[str], float],
        grace_seconds: float,
        deaf_phases: Collection[str],
    ) -> None:
        """Begin at `now`; the looks are meant to be `pause_seconds` apart."""
        self._looked_at = self._entered_at = now
        self._longest_look = pause_seconds + LONGEST_LOOK_SECONDS
        self._allowed_seconds = allowed_seconds
        self._grace_seconds = grace_seconds
        self._deaf_phases = frozenset(deaf_phases)
        self._phase: str | None = None
        self._silent = 0.0
        self._asked_at: float | None = None

    def look(self, now: float, *, phase: str, moved: bool, asked: bool) -> Stalled | Deaf | None:
        """One look.

        Args:
            now: the moment, on a clock that never goes back.
            phase: the one under way.
            moved: whether there was a beat since the last look.
            asked: whether someone asked to stop.
        """
        self._silent += min(now - self._looked_at, self._longest_look)
        self._looked_at = now
        if phase != self._phase:
            self._phase, self._entered_at, moved = phase, now, True
        if moved:
            self._silent = 0.0
        if asked and self._asked_at is None:
            self._asked_at = now
        if self._asked_at is not None and now >= self._heard_by(self._asked_at):
            return Deaf(phase=phase, left_seconds=self._asked_at + self._grace_seconds - now)
        if self._silent > self._allowed_seconds(phase):
            return Stalled(phase=phase, seconds=self._silent)
        return None

    def _heard_by(self, asked_at: float) -> float:
        # Real time, a frozen process or not: the one who asked does not wait longer for it.
        last = asked_at + self._grace_seconds - min(LAST_SECONDS, self._grace_seconds / 10)
        if self._phase in self._deaf_phases:
            return min(last, max(asked_at, self._entered_at) + DEAF_SECONDS)
        return last
