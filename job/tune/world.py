"""What training knows of the processes that train one adapter together: orders, and sums in a fixed order.

Rank 0 decides and orders, the others obey, so that nothing has to be agreed on. A process that works alone has the
world `ALONE`, in which every sum is what was put in, and which loads nothing of torch.distributed.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from job.core.errors import PeerLostError, StalledError


class Order(enum.IntEnum):
    """What rank 0 lets the others do next."""

    STEP = 1
    EVALUATE = 2
    ANSWER = 3
    SETTLE = 4
    STOP = 5
    DONE = 6
    PREPARE = 7
    PROVE = 8
    """It judges a model alone, and a base that is sharded is to be there for it."""
    LOAD = 9
    """The base, to train on: what was to be judged before is judged."""


class PeerSilentError(StalledError):
    """Another process of the run lives, but did not answer in time."""


LOST = (PeerLostError, PeerSilentError)
"""What is raised where another process no longer answers."""


class World(Protocol):
    """What training knows of the other processes."""

    @property
    def rank(self) -> int:
        """Our number, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def bytes_sent(self) -> int:
        """How much this process has sent to others in sums, since it began."""
        ...

    @property
    def lost(self) -> bool:
        """Whether another process is known to be gone: what waits for it on a device waits for ever."""
        ...

    def lose(self) -> None:
        """One is gone."""
        ...

    @property
    def broken_off(self) -> bool:
        """Whether sums were broken off, as one is gone: what a device has done since then is of no use."""
        ...

    def order(self, what: Order, *numbers: int) -> None:
        """Rank 0 lets the others do something; from another rank it is nothing."""
        ...

    def agree(self, *, go: bool) -> bool:
        """Meet all others; whether each of them goes on.

        Raises:
            PeerLostError: one of them is gone.
        """
        ...

    @property
    def sums_early(self) -> bool:
        """Whether a sum may begin while layers are still passed."""
        ...

    def begin_sum(self, vector: Tensor, after: Any = None) -> Callable[[], None]:
        """Begin `sum_in_order` of one vector; returns what waits for it.

        On a GPU it runs beside what is computed, and only the current stream waits. All ranks begin the same sums in
        the same order.

        Args:
            vector: is whole once `after` has passed, and is the sum once it was waited for.
            after: a CUDA event; None: once the current stream has done what it was given so far.

        Raises:
            PeerLostError: one of them is gone, now or in the wait.
        """
        ...

    def sum_in_order(self, vectors: Sequence[Tensor]) -> None:
        """Replace each vector by the sum over all ranks, added up in one order, the same bits everywhere.

        Raises:
            PeerLostError: one of them is gone; the vectors are of no use.
        """
        ...

    def gather(self, value: Any) -> list[Any]:
        """What each rank has to say, by rank; anything that JSON holds.

        Raises:
            PeerLostError: one of them is gone.
        """
        ...

    def share(self, value: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """What rank 0 has to say, and its tensors, on the CPU; what others give is not looked at.

        Raises:
            PeerLostError: one of them is gone.
        """
        ...


class _Alone:
    """A world of one process."""

    rank, size, bytes_sent, lost, broken_off, sums_early = 0, 1, 0, False, False, False

    def lose(self) -> None:
        """There is none."""

    def order(self, what: Order, *numbers: int) -> None:
        """Nobody is there to obey."""

    def agree(self, *, go: bool) -> bool:
        """As we do."""
        return go

    def begin_sum(self, vector: Tensor, after: Any = None) -> Callable[[], None]:  # noqa: ARG002 - it is the sum
        """It is it."""
        return lambda: None

    def sum_in_order(self, vectors: Sequence[Tensor]) -> None:
        """They are it."""

    def gather(self, value: Any) -> list[Any]:
        """Ours."""
        return [value]

    def share(self, value: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Ours."""
        return value, dict(tensors)


ALONE: World = _Alone()
