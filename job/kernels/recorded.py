"""Work that is done over and over in the same memory, as CUDA graphs: a token's launches take longer than its kernels.

Each kind of work is done once as it is, which compiles kernels and sets libraries up, then recorded; from the next time
on it is replayed. Where the driver, a library or the memory does not allow that, it is done as it is, always.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch

_MOST = 64
"""Recordings that are kept: each holds memory of its own."""


class Recorder:
    """Does work, and replays it."""

    def __init__(self, *, wanted: bool, on_failure: Callable[[str], None]) -> None:
        """Whether anything is recorded at all, and who is told once why nothing is any more."""
        self._wanted = wanted
        self._on_failure = on_failure
        self._graphs: dict[Hashable, Any] = {}
        self._pool: Any = None

    def run(self, kind: Hashable, work: Callable[[], None]) -> None:
        """Do the work.

        Args:
            kind: names the work and the memory that it reads and writes.
            work: reads and writes memory that stays where it is, waits for nothing, and returns nothing.
        """
        graph = self._graphs.get(kind)
        if graph is not None:
            graph.replay()
            return
        work()
        if self._wanted and len(self._graphs) < _MOST:
            self._graphs[kind] = self._recorded(work)

    def forget(self) -> None:
        """Drop all recordings: what they read and write is given up."""
        self._graphs.clear()
        self._pool = None

    def _recorded(self, work: Callable[[], None]) -> Any:
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # Other threads copy to the host meanwhile: only the forbidden calls of this one may end the recording.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:  # running out of memory is one, and work that is not recorded needs less
            self._wanted = False
            self._on_failure(f"{type(error).__name__}: {error}"[:300])
            return None
        return graph
