"""The processes that train one adapter together: orders, and sums in a fixed order. Owner of torch.distributed.

Rank 0 decides and orders, the others obey, so that nothing has to be agreed on. A process that works alone has the
world `ALONE`, in which every sum is what was put in, and which loads nothing of torch.distributed.
"""

import enum
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from job.core.errors import PeerLostError, StalledError, StopRequestedError, action_for, exit_code, is_effect
from job.core.scaling import SUM_PIECE
from job.core.seat import Seat

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

_FOR_EVER = timedelta(days=30)
"""Whoever waits for an order waits as long as the one that orders lives: a socket that closes ends the wait."""
_KEYS = "qlora-job"
_LONGEST = 2000
"""Characters of a reason."""


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

    def order(self, what: Order, *numbers: int) -> None:
        """Rank 0 lets the others do something; from another rank it is nothing."""
        ...

    def agree(self, *, go: bool) -> bool:
        """Meet all others; whether each of them goes on.

        Raises:
            PeerLostError: one of them is gone.
        """
        ...

    def sum_in_order(self, vectors: Sequence[Tensor]) -> None:
        """Replace each vector by the sum over all ranks, added up by rank from 0, the same bits everywhere.

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

    rank, size, bytes_sent, lost = 0, 1, 0, False

    def lose(self) -> None:
        """There is none."""

    def order(self, what: Order, *numbers: int) -> None:
        """Nobody is there to obey."""

    def agree(self, *, go: bool) -> bool:
        """As we do."""
        return go

    def sum_in_order(self, vectors: Sequence[Tensor]) -> None:
        """They are it."""

    def gather(self, value: Any) -> list[Any]:
        """Ours."""
        return [value]

    def share(self, value: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Ours."""
        return value, dict(tensors)


ALONE: World = _Alone()


CAUSE = "cause"
"""Where the first process that ends leaves word of it, where that ends the others too."""


class Meeting:
    """The launcher's key-value store, where processes leave word for each other before they are a group and after."""

    def __init__(self, seat: Seat) -> None:
        """Connect to it.

        Raises:
            PeerLostError: it does not answer: the launcher of the first node is gone.
        """
        from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch exports it without saying so
        from torch.distributed.distributed_c10d import PrefixStore

        self.seat = seat
        with _peers():
            tcp = TCPStore(seat.host, seat.port, is_master=False, timeout=timedelta(seconds=60))
            self._store: Store = PrefixStore(_KEYS, tcp)

    def say(self, key: str, value: Any) -> None:
        """Leave word under a key; what stood there stays: the first one counts."""
        with _peers():
            self._store.compare_set(key, "", json.dumps(value))

    def heard(self, key: str) -> Any | None:
        """What stands under a key; None: nothing yet."""
        with _peers():
            return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def join(self, device: torch.device, *, patience: Callable[[], float]) -> "Ranks":
        """Become one group; every process must come, within the time that patience allows.

        Args:
            device: the one that we compute on.
            patience: how many seconds another process may take to answer, asked at each wait.
        """
        return Ranks(self._store, self.seat, device, patience)


def leave_cause(seat: Seat, error: BaseException | None) -> None:
    """Tell the others what this process has ended with, where that is what they end with too.

    Raises:
        PeerLostError: the launcher is gone.
    """
    is_stop = isinstance(error, StopRequestedError)
    if is_effect(error) or (not seat.leads and (error is None or is_stop)):
        return
    code, said = (0, "done") if error is None else (exit_code(error), str(error) or type(error).__name__)
    cause = {"rank": seat.rank, "code": code, "reason": said[:_LONGEST], "action": action_for(error)}
    Meeting(seat).say(CAUSE, cause)


class Ranks:
    """A world of several processes."""

    def __init__(self, store: "Store", seat: Seat, device: torch.device, patience: Callable[[], float]) -> None:
        """Every process of the run must do this now."""
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore

        self._dist, self._device, self._patience = dist, device, patience
        self.rank, self.size, self.bytes_sent, self.lost = seat.rank, seat.size, 0, False
        cuda = self._on_gpu = device.type == "cuda"
        with _peers():
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=PrefixStore("groups", store),
                rank=seat.rank,
                world_size=seat.size,
                timeout=_FOR_EVER,
                device_id=device if cuda else None,
            )
            self._data: ProcessGroup | None = dist.group.WORLD
            self._orders = dist.new_group(backend="gloo", timeout=_FOR_EVER)
            self._words = dist.new_group(backend="gloo", timeout=_FOR_EVER)
        self._kept: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._rows: ProcessGroup | None = None
        self._turns: ProcessGroup | None = None
        self.before_meeting: Callable[[], None] = _nothing
        """Called before ranks meet in anything but a turn: who holds a sharded base helps the others to end theirs."""

    def lose(self) -> None:
        """As in `World`, like what follows."""
        self.lost = True

    def order(self, what: Order, *numbers: int) -> None:
        """Without waiting for those who obey."""
        if self.rank == 0:
            given = [int(what), *numbers, 0, 0][:3]
            with _peers():
                self._dist.broadcast(torch.tensor(given), 0, group=self._orders)

    def obey(self) -> tuple[Order, int, int]:
        """Wait for rank 0's next order.

        Raises:
            PeerLostError: it is gone.
        """
        given = torch.zeros(3, dtype=torch.int64)
        with _peers():
            self._dist.broadcast(given, 0, group=self._orders)
        what, first, second = given.tolist()
        return Order(what), first, second

    def agree(self, *, go: bool) -> bool:
        """On the CPU alone: a device that waits for nobody."""
        self.before_meeting()
        mine, all_of_them = torch.tensor([int(go)]), torch.zeros(self.size, dtype=torch.int64)
        self._gathered(all_of_them, mine)
        return bool(all_of_them.all())

    def sum_in_order(self, vectors: Sequence[Tensor]) -> None:
        """A piece at a time."""
        self.before_meeting()
        for vector in vectors:
            for piece in torch.split(vector, SUM_PIECE):
                self._sum(piece)

    def _sum(self, piece: Tensor) -> None:
        """Each rank adds up one part of the piece, and all get all parts."""
        part = -(-piece.numel() // self.size)
        sent, received = self._room(piece, part * self.size)
        sent[: piece.numel()].copy_(piece)
        sent[piece.numel() :].zero_()
        group = self._data if piece.device.type == self._device.type else self._words
        with _peers():
            self._wait(self._dist.all_to_all_single(received, sent, group=group, async_op=True), group)
            parts = received.view(self.size, part)
            total = parts[0].clone()
            for other in parts[1:]:
                total += other
            self._wait(self._dist.all_gather_into_tensor(sent, total, group=group, async_op=True), group)
        piece.copy_(sent[: piece.numel()])
        self.bytes_sent += 2 * (self.size - 1) * part * piece.element_size()

    def _room(self, piece: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Two buffers; those of the large pieces are kept."""
        if piece.numel() < SUM_PIECE // 16:
            return piece.new_empty(size), piece.new_empty(size)
        sent, received = self._kept.get((piece.device, piece.dtype), (None, None))
        if sent is None or received is None or sent.numel() < size:
            sent, received = piece.new_empty(size), piece.new_empty(size)
            self._kept[piece.device, piece.dtype] = sent, received
        return sent[:size], received[:size]

    def gather(self, value: Any) -> list[Any]:
        """As JSON."""
        self.before_meeting()
        mine = _bytes_of(json.dumps(value).encode())
        sizes = torch.zeros(self.size, dtype=torch.int64)
        self._gathered(sizes, torch.tensor([mine.numel()]))
        most = int(sizes.max())
        said = torch.zeros(self.size * most, dtype=torch.uint8)
        self._gathered(said, torch.cat([mine, torch.zeros(most - mine.numel(), dtype=torch.uint8)]))
        rows = said.view(self.size, most)
        return [json.loads(bytes(row[:size].numpy())) for row, size in zip(rows, sizes.tolist(), strict=True)]

    def share(self, value: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Byte by byte."""
        form = [(name, str(tensor.dtype).removeprefix("torch."), [*tensor.shape]) for name, tensor in tensors.items()]
        said, forms = self.gather([value, form])[0]
        shared: dict[str, Tensor] = {}
        for name, dtype, shape in forms:
            if self.rank == 0:
                tensor = tensors[name].detach().cpu().contiguous()
            else:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            if tensor.numel():
                with _peers():
                    raw = tensor.reshape(-1).view(torch.uint8)
                    self._wait(self._dist.broadcast(raw, 0, group=self._words, async_op=True), self._words)
            shared[name] = tensor
        return said, shared

    def _gathered(self, into: Tensor, mine: Tensor, group: "ProcessGroup | None" = None) -> None:
        group = group or self._words
        with _peers():
            self._wait(self._dist.all_gather_into_tensor(into, mine, group=group, async_op=True), group)

    # --- a base that is sharded ---------------------------------------------------------------------------------------

    def share_rows(self) -> None:
        """Get ready for turns and rows, in groups of their own, where they queue behind nothing; all ranks, once."""
        if self._turns is None:
            with _peers():
                self._turns = self._dist.new_group(backend="gloo", timeout=_FOR_EVER)
                self._rows = self._dist.new_group(backend="nccl" if self._on_gpu else "gloo", timeout=_FOR_EVER)

    def turn(self, wish: int) -> int:
        """The largest of what all ranks wish for."""
        wishes = torch.zeros(self.size, dtype=torch.int64)
        self._gathered(wishes, torch.tensor([wish]), self._turns)
        return int(wishes.max())

    def gather_row(self, part: Tensor, row: Tensor) -> Callable[[], None]:
        """Begin to gather a row of bytes, of which each rank has a part; returns what waits for it.

        On a GPU it begins once the current stream has done what it was given so far, on a stream of its own; there
        only the current stream waits.
        """
        with _peers():
            work = self._dist.all_gather_into_tensor(row, part, group=self._rows, async_op=True)
        self.bytes_sent += (self.size - 1) * part.numel()

        def wait() -> None:
            with _peers():
                self._wait(work, self._rows)

        return wait

    def _wait(self, work: Any, group: Any) -> None:
        """On a GPU's group only its stream waits."""
        if self._on_gpu and (group is self._data or group is self._rows):
            work.wait()
            return
        seconds = self._patience()
        began = time.monotonic()
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            if time.monotonic() - began >= seconds or "timed out" in str(error).lower():
                raise PeerSilentError(
                    f"another process of the run did not answer for {seconds:.0f} s; look at its stacks in the log, "
                    "then start the same job again"
                ) from error
            raise


def _nothing() -> None:
    """There is no sharded base."""


def _bytes_of(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@contextmanager
def _peers() -> Iterator[None]:
    """What goes wrong between processes, as what it means: one of them is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = str(error).partition("\n")[0].partition(". ")[0]
        raise PeerLostError(
            f"another process of the run is gone ({said:.200}); its own log says why",
            action="look at the log of the other processes, then start the same job again",
        ) from error
