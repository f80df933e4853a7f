"""Several processes as one world: how they meet, obey, sum and gather. Owner of torch.distributed."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from job.core.attempt.seat import Seat
from job.core.errors import PeerLostError, StopRequestedError, action_for, exit_code, is_effect
from job.core.plan.scaling import PAIR, SUM_PIECE
from job.tune.world import Order, PeerSilentError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store

_FOR_EVER = timedelta(days=30)
"""Whoever waits for an order waits as long as the one that orders lives: a socket that closes ends the wait."""
_STUCK_SECONDS = 3.0
"""From a loss on: longer than who waits in `wait_for` takes to give up by itself."""
_KEYS = "qlora-job"
_LONGEST = 2000
"""Characters of a reason."""
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
        self.rank, self.size, self.bytes_sent = seat.rank, seat.size, 0
        self.lost, self.broken_off = False, False
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
            self._levels = self._sum_levels(seat)
            self._orders = dist.new_group(backend="gloo", timeout=_FOR_EVER)
            self._words = dist.new_group(backend="gloo", timeout=_FOR_EVER)
            alive = dist.new_group(backend="gloo", timeout=_FOR_EVER)
        self._kept: dict[tuple[torch.dtype, str], Tensor] = {}
        self._beside: torch.cuda.Stream | None = None
        self._rows: ProcessGroup | None = None
        self._turns: ProcessGroup | None = None
        self._on_device: list[Any] = []
        """What the device was given that needs the others, and has not done yet, when it was last looked at."""
        self.before_meeting: Callable[[], None] = _nothing
        """Called before ranks meet in anything but a turn: who holds a sharded base helps the others to end theirs."""
        threading.Thread(target=self._watch, args=(alive,), name="peers", daemon=True).start()

    def _watch(self, alive: "ProcessGroup") -> None:
        """Wait for what nobody sends: the wait ends when a process that could send it is gone.

        Who waits for a device hears of it by nothing else where the other one was killed and could leave no word.
        """
        nothing = torch.zeros(1)
        with suppress(RuntimeError):
            if self.rank == 0:
                self._dist.gather(nothing, [torch.zeros(1) for _ in range(self.size)], group=alive)
            else:
                self._dist.recv(nothing, 0, group=alive)
        self.lose()
        if self._on_gpu:
            self._free_device()

    def _free_device(self) -> None:
        """Break off what the device waits for in vain, so that calls of CUDA's that wait for the device return."""
        while True:
            time.sleep(_STUCK_SECONDS)
            if not all(each.is_completed() for each in self._on_device):
                break
        self.broken_off = True  # first: what passes on the device from here on is not to be trusted
        groups = {id(group): group for group in (self._rows, *(group for group, _ in self._levels)) if group}
        for group in groups.values():
            with suppress(RuntimeError):
                group.abort()

    def _sum_levels(self, seat: Seat) -> list[tuple[Any, int]]:
        """Groups, and their sizes, that sum one after another: what a node has summed crosses the network once."""
        if seat.nodes_that_sum == 1:
            return [(self._dist.group.WORLD, seat.size)]
        ranks = range(seat.size)
        nodes = [[*ranks[start : start + seat.gpus]] for start in ranks[:: seat.gpus]]
        peers = [[*ranks[place :: seat.gpus]] for place in range(seat.gpus)]
        levels = []
        for groups in (nodes, peers):
            mine, _ = self._dist.new_subgroups_by_enumeration(groups, timeout=_FOR_EVER)  # type: ignore[no-untyped-call]
            levels.append((mine, len(groups[0])))
        return levels

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

    @property
    def sums_early(self) -> bool:
        """Not beside the gathers of a sharded base: two sums of NCCL at once may wait for each other."""
        return self._rows is None

    def sum_in_order(self, vectors: Sequence[Tensor]) -> None:
        """A piece at a time; by rank from 0 within a node, then by node."""
        for vector in vectors:
            for piece in torch.split(vector, SUM_PIECE):
                self.begin_sum(piece)()

    def begin_sum(self, vector: Tensor, after: Any = None) -> Callable[[], None]:
        """Each rank adds up one part of the vector, and all get all parts: of a node first, then over the nodes."""
        self.before_meeting()
        if vector.device.type != "cuda":
            return self._parts_exchanged(vector, [(self._words, self.size)] if self._on_gpu else self._levels)
        if self._beside is None:
            self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        if after is None:
            self._beside.wait_stream(torch.cuda.current_stream())
        else:
            self._beside.wait_event(after)
        with torch.cuda.stream(self._beside):
            self._parts_exchanged(vector, self._levels)()
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return lambda: torch.cuda.current_stream().wait_event(done)

    def _parts_exchanged(self, vector: Tensor, levels: Sequence[tuple[Any, int]]) -> Callable[[], None]:
        """Begin the first half of the first level; returns what waits for it and does the rest."""
        (group, size), *further = levels
        if size == PAIR and not further:
            return self._both_exchanged(vector, group)
        part = -(-vector.numel() // size)
        whole = part * size == vector.numel()
        received = self._room(vector, part * size, name=f"received {len(levels)}")
        # What divides evenly needs no room to be sent from, and none to come back to.
        sent = vector if whole else self._room(vector, part * size, name=f"sent {len(levels)}")
        if not whole:
            sent[: vector.numel()].copy_(vector)
            sent[vector.numel() :].zero_()
        with _peers():
            exchanged = self._dist.all_to_all_single(received, sent, group=group, async_op=True)

        def finish() -> None:
            with _peers():
                self._wait(exchanged, group)
                total, *others = received.view(size, part)
                for other in others:
                    total += other
            if further:
                self._parts_exchanged(total, further)()
            with _peers():
                self._wait(self._dist.all_gather_into_tensor(sent, total, group=group, async_op=True), group)
            if not whole:
                vector.copy_(sent[: vector.numel()])

        self.bytes_sent += 2 * (size - 1) * part * vector.element_size()
        return finish

    def _both_exchanged(self, vector: Tensor, group: Any) -> Callable[[], None]:
        """Two ranks send each other all of it, as many bytes as in halves, at once: both add the same two up."""
        received = self._room(vector, PAIR * vector.numel(), name="both")
        with _peers():
            exchanged = self._dist.all_gather_into_tensor(received, vector, group=group, async_op=True)

        def finish() -> None:
            with _peers():
                self._wait(exchanged, group)
            first, second = received.view(PAIR, -1)
            torch.add(first, second, out=vector)

        self.bytes_sent += vector.nbytes
        return finish

    def _room(self, vector: Tensor, size: int, *, name: str) -> Tensor:
        """A buffer; on a GPU, where one sum is made after another, those of large pieces are kept."""
        if vector.device.type != "cuda" or vector.numel() < SUM_PIECE // 16:
            return vector.new_empty(size)
        kept = self._kept.get((vector.dtype, name))
        if kept is None or kept.numel() < size:
            kept = self._kept[vector.dtype, name] = vector.new_empty(size)
        return kept[:size]

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
        if self._on_gpu:
            self._given(work)  # begun ahead: it may hold the device before anybody waits for it
        self.bytes_sent += (self.size - 1) * part.numel()

        def wait() -> None:
            with _peers():
                self._wait(work, self._rows)

        return wait

    def _given(self, work: Any) -> None:
        """Who frees the device looks at it from another thread."""
        self._on_device = [each for each in self._on_device if each is not work and not each.is_completed()] + [work]

    def _wait(self, work: Any, group: Any) -> None:
        """In a group of GPUs only the stream waits."""
        if self._on_gpu and (group is self._rows or any(group is each for each, _ in self._levels)):
            work.wait()
            self._given(work)
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
