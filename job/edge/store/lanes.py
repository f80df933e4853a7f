"""Runs jobs on a few threads and hands back their results in order, within a bounded memory; stops when asked."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self, TypeVar

from job.core.errors import StopRequestedError, UnavailableError
from job.edge.store.objects import PARALLEL

T = TypeVar("T")
_POLL_SECONDS = 0.1
"""How late a stop request may be seen."""
_LONGEST_LOOK_SECONDS = 1.0
"""More than this is not counted between two looks: the rest of it this process was frozen, and nothing could arrive."""


class Lanes:
    """A few threads for one transfer; leaving the block cancels what has not begun."""

    def __init__(
        self,
        what: str,
        should_stop: Callable[[], bool],
        *,
        silence_seconds: float | None = None,
        settle_seconds: float = 0.0,
    ) -> None:
        """Say `what` is done in messages; after a failure wait `settle_seconds` for jobs under way to end."""
        self.cancelled = threading.Event()
        """Set when nobody waits for the results any more; jobs that pause or loop look at it."""
        self._what = what
        self._should_stop = should_stop
        self._silence_seconds = silence_seconds
        self._settle_seconds = settle_seconds
        self._silent = 0.0
        """Seconds without a byte, as far as this process ran."""
        self._looked_at = time.monotonic()
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="store")
        self._window: deque[Future[Any]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if error is not None:
            # Without those that never began: to `wait` a cancelled one is done only once a thread has taken it up.
            wait([each for each in self._window if not each.cancelled()], timeout=self._settle_seconds)

    def moved(self) -> None:
        """Bytes arrived: the silence begins anew."""
        self._silent = 0.0

    def in_order(self, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
        """The jobs' results in the jobs' order; at most PARALLEL are under way or wait to be taken.

        Raises:
            StopRequestedError: someone asked us to stop.
            UnavailableError: nothing moved for `silence_seconds`.
        """
        futures: deque[Future[T]] = deque()
        for job in jobs:
            if len(futures) == PARALLEL:
                yield self._result(futures.popleft())
            futures.append(self._submit(job))
        while futures:
            yield self._result(futures.popleft())

    def run(self, job: Callable[[], T]) -> T:
        """One job's result."""
        return self._result(self._submit(job))

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        future = self._pool.submit(job)
        self._window.append(future)
        while self._window and self._window[0].done():
            self._window.popleft()
        return future

    def _result(self, future: Future[T]) -> T:
        while not wait([future], timeout=_POLL_SECONDS).done:
            self._check()
        self._check()
        return future.result()

    def _check(self) -> None:
        if self._should_stop():
            raise StopRequestedError(f"stopped on request while {self._what}")
        before, self._looked_at = self._looked_at, time.monotonic()
        self._silent += min(self._looked_at - before, _LONGEST_LOOK_SECONDS)
        if self._silence_seconds is not None and self._silent > self._silence_seconds:
            raise UnavailableError(
                f"nothing arrived for {self._silent:.0f} s while {self._what}; look at the store and the network, "
                "then start the same job again"
            )
