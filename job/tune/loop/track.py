"""Trackers follow the run, each on a thread of its own: one that is slow or away costs a warning, and never the run."""

import contextvars
import functools
import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from job.core.errors import UsageError
from job.core.recipe.schema import TrackSection
from job.tune.loop.trackers import TRACKERS, Conclusion, Ended, LastStep, TrackedRun, Tracker, Values

_MOST_WAITING = 20_000
"""Steps that a tracker may be behind."""
_AT_ONCE = 200
"""Steps that are sent together by a tracker that is behind."""
_POLL_SECONDS = 0.05
_KILL = 9
"""SIGKILL, by its number: signals are the front door's."""


def refuse_trackers(track: TrackSection) -> None:
    """Look for the trackers' packages before anything begins.

    Raises:
        UsageError: one is not installed.
    """
    missing = [name for name in track.trackers if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(sorted(missing))
        raise UsageError(f"track.trackers: {names} is not installed here; add the package to the image, or remove it")


def make_accelerator(*, on_cpu: bool) -> Accelerator:
    """Accelerate, for the backward pass and the gradients' norm."""
    return Accelerator(cpu=on_cpu)


class Tracking:
    """All trackers of a run. A failure of one is reported once, and ends it alone."""

    def __init__(
        self,
        trackers: Sequence[str],
        *,
        on_failure: Callable[[str], None],
        on_beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is begun yet.

        Args:
            trackers: their names in the recipe.
            on_failure: gets the reason, on a thread of the tracker's.
            on_beat: called while they are waited for.
        """
        self._followers = [_Follower(TRACKERS[name](), on_failure) for name in trackers]
        self._on_beat = on_beat

    def begin(self, run: TrackedRun) -> None:
        """Open the tracked run, or continue that of an earlier attempt."""
        for follower in self._followers:
            follower.begin(run)

    def log(self, numbers: Mapping[str, float], *, step: int) -> None:
        """Send the numbers of one step."""
        values = Values(step=step, time=time.time(), numbers=dict(numbers))
        for follower in self._followers:
            follower.put(values)

    def conclude(self, conclusion: Conclusion) -> None:
        """Send what came of the run."""
        for follower in self._followers:
            follower.put(lambda tracker: tracker.conclude(conclusion))

    def end(self, ended: Ended, *, seconds: float) -> None:
        """Let the trackers finish sending; one that takes longer is given up."""
        for follower in self._followers:
            follower.close(ended)
        until = time.monotonic() + seconds
        for follower in self._followers:
            while not follower.is_over and time.monotonic() < until:
                self._on_beat()
                follower.wait(_POLL_SECONDS)
            if not follower.is_over:
                follower.give_up(f"it did not take all that it was sent within {seconds:.0f} s")


_Work = Callable[[Tracker], None]


class _Follower:
    """One tracker, and the thread that alone speaks to it: in order, several steps at once where it is behind."""

    def __init__(self, tracker: Tracker, on_failure: Callable[[str], None]) -> None:
        self._tracker = tracker
        self._on_failure = on_failure
        self._waiting: queue.Queue[Values | _Work] = queue.Queue(_MOST_WAITING)
        self._over = threading.Event()
        self._reporting = threading.Lock()

    @property
    def is_over(self) -> bool:
        """Whether it hears nothing more: it failed, or was given up, or was never begun."""
        return self._over.is_set()

    def begin(self, run: TrackedRun) -> None:
        """Start the thread."""
        work = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._work, run),
            name=f"tracker-{self._tracker.name}",
            daemon=True,
        )
        work.start()

    def put(self, item: "Values | _Work") -> None:
        """Hand something over, without waiting for it."""
        if self.is_over:
            return
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self.give_up(f"it is {_MOST_WAITING:,} steps behind")

    def close(self, ended: Ended) -> None:
        """End once all that was handed over before has been sent."""

        def last(tracker: Tracker) -> None:
            tracker.close(ended)
            self._over.set()

        self.put(last)

    def wait(self, seconds: float) -> None:
        """Wait for it to be over, within the time."""
        self._over.wait(seconds)

    def give_up(self, reason: str) -> None:
        """Leave it alone from here on, with what it has started: the process is not to wait for it at its end."""
        self._fail(reason)
        self._end_children()

    def _end_children(self) -> None:
        for pid in _children_named(self._tracker.children):
            with suppress(OSError):
                os.kill(pid, _KILL)

    def _work(self, run: TrackedRun) -> None:
        try:
            self._catch_up(run.history, functools.cache(self._tracker.open(run)))
            ahead: Values | _Work | None = None
            while not self.is_over:
                item = self._waiting.get() if ahead is None else ahead
                ahead = None
                if not isinstance(item, Values):
                    item(self._tracker)
                    continue
                batch = [item]
                while len(batch) < _AT_ONCE and ahead is None:
                    try:
                        following = self._waiting.get_nowait()
                    except queue.Empty:
                        break
                    if isinstance(following, Values):
                        batch.append(following)
                    else:
                        ahead = following
                self._tracker.log(batch)
        except Exception as error:  # noqa: BLE001 - trackers raise anything; none of it may cost a night of training
            self._fail(f"{type(error).__name__}: {error}")
            if isinstance(error, TimeoutError):  # the library gave up, and what it has started has not
                self._end_children()

    def _catch_up(self, history: Sequence[Values], last_step: LastStep) -> None:
        """Send what the tracker lacks of what was made before this attempt."""
        missing = []
        for values in history:
            numbers = {name: each for name, each in values.numbers.items() if values.step > last_step(name)}
            if numbers:
                missing.append(replace(values, numbers=numbers))
        for start in range(0, len(missing), _AT_ONCE):
            if not self.is_over:
                self._tracker.log(missing[start : start + _AT_ONCE])

    def _fail(self, reason: str) -> None:
        with self._reporting:
            if self.is_over:
                return
            self._over.set()
        self._on_failure(f"tracking by {self._tracker.name} stopped: {reason}")


def _children_named(programs: Sequence[str]) -> list[int]:
    """Processes that this one has started, by the name of their program."""
    found = []
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children") if programs else ():
        with suppress(OSError, ValueError):
            pids = [int(pid) for pid in children.read_text(encoding="ascii").split()]
            found += [p for p in pids if Path(f"/proc/{p}/comm").read_text(encoding="utf-8").strip() in programs]
    return found
