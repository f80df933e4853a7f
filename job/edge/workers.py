"""Work in several processes: items go to whoever is free, what comes of them comes back in the items' order.

The processes are begun anew, not forked: this one has threads by then, and a fork would have their locks without them.
Each has its own pipe, so that it ends when this process does, however that ends.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any, Self, TypeVar

from job.core.errors import JobError, StopRequestedError
from job.edge.host.interrupt import kept_from_children

T = TypeVar("T")
R = TypeVar("R")
ALONE_BYTES = 2**23
"""Of items, which are done in this process: the others take a second to begin."""
_AHEAD = 2
"""Items of a process, the one that it works on included: it need not wait for this one."""
_UNDER_WAY_BYTES = 2**26
"""Of items in all processes together, unless one has more by itself."""
_LOOK_SECONDS = 0.1
"""A request to stop is looked for this often."""


def in_order(
    task: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int,
    size_of: Callable[[T], int],
    should_stop: Callable[[], bool],
    doing: str,
) -> Iterator[R]:
    """What the task makes of each item, in their order, whoever made it; and so the first error in their order.

    Args:
        task: goes to each process once; an error of it is raised here.
        items: taken as they are wanted.
        workers: processes; 1: this one. Few items are left to it in any case.
        size_of: bytes of an item.
        should_stop: polled all the time.
        doing: for messages: "encoding the data".

    Raises:
        JobError: a process was killed.
        MemoryError: in a process.
        StopRequestedError: asked to stop.
    """
    left = iter(items)
    first: deque[T] = deque()
    size = 0
    while workers > 1 and size <= ALONE_BYTES and (item := next(left, None)) is not None:
        first.append(item)
        size += size_of(item)
    every = chain(_emptied(first), left)
    if workers > 1 and size > ALONE_BYTES:
        with _Crew(task, workers, doing) as crew:
            yield from crew.work(every, size_of, should_stop)
        return
    for item in every:
        _stop_if_asked(should_stop, doing)
        yield task(item)


def _emptied(items: deque[T]) -> Iterator[T]:
    while items:
        yield items.popleft()


def _stop_if_asked(should_stop: Callable[[], bool], doing: str) -> None:
    if should_stop():
        raise StopRequestedError(f"asked to stop while {doing}")


class _Crew:
    """The processes, for as long as the block lasts."""

    def __init__(self, task: Callable[[Any], Any], workers: int, doing: str) -> None:
        self._task = pickle.dumps(task)
        self._doing = doing
        self._members = [_Member() for _ in range(workers)]

    def __enter__(self) -> Self:
        with kept_from_children():
            for member in self._members:
                member.begin(self._task)
        return self

    def __exit__(self, *_error: object) -> None:
        for member in self._members:
            member.end()

    def work(
        self, items: Iterator[Any], size_of: Callable[[Any], int], should_stop: Callable[[], bool]
    ) -> Iterator[Any]:
        done: dict[int, tuple[bool, Any]] = {}
        sizes: dict[int, int] = {}
        given = wanted = 0
        item = next(items, None)
        while item is not None or wanted < given:
            _stop_if_asked(should_stop, self._doing)
            while item is not None:
                size = size_of(item)
                free = min(self._members, key=lambda member: len(member.numbers))
                if len(free.numbers) == _AHEAD or (sizes and sum(sizes.values()) + size > _UNDER_WAY_BYTES):
                    break
                self._give(free, given, item)
                sizes[given] = size
                given += 1
                item = next(items, None)
            for member in self._ready():
                number = member.numbers[0]
                done[number] = self._take(member)
            while wanted in done:
                del sizes[wanted]
                failed, content = done.pop(wanted)
                if failed:
                    raise content
                yield content
                wanted += 1

    def _ready(self) -> list["_Member"]:
        found = wait([member.ours for member in self._members], timeout=_LOOK_SECONDS)
        return [member for member in self._members if member.ours in found]

    def _give(self, member: "_Member", number: int, item: Any) -> None:
        try:
            member.ours.send_bytes(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL))
        except OSError:
            raise self._killed(member) from None
        member.numbers.append(number)

    def _take(self, member: "_Member") -> tuple[bool, Any]:
        """Whether its next item failed, and what came of it."""
        try:
            answer: tuple[bool, Any] = pickle.loads(member.ours.recv_bytes())  # noqa: S301 - a process of ours wrote it
        except (EOFError, OSError):
            raise self._killed(member) from None
        member.numbers.popleft()
        return answer

    def _killed(self, member: "_Member") -> JobError:
        code = member.exit_code()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return JobError(
            f"a process of this job ended by itself ({how}) while {self._doing}; most often the system ends one for "
            "lack of memory",
            action="give the job more memory, or fewer CPUs: each has a process of its own",
        )


class _Member:
    """One process, and what it was given."""

    def __init__(self) -> None:
        self.numbers: deque[int] = deque()
        """Of the items that it has, in the order in which it does them."""
        self.ours, self._theirs = Pipe()
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, task: bytes) -> None:
        with self._theirs as theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        with contextlib.suppress(OSError):  # it has ended: taking from it says how
            self.ours.send_bytes(task)

    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.wait()

    def end(self) -> None:
        self.ours.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from job.edge.workers import serve; serve(int(sys.argv[1]))"
)


def serve(descriptor: int) -> None:
    """What such a process does, until the other end of its pipe is closed: the first packet is the task."""
    # Read by the library when it first encodes: every core has a process like this one.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    packets: SimpleQueue[bytes] = SimpleQueue()
    with Connection(descriptor) as pipe, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        # On a thread: were packets not taken while an answer is sent, both processes could wait for each other.
        Thread(target=_receive, args=(pipe, packets), daemon=True).start()
        task = None
        while True:
            packet = packets.get()
            try:
                content = pickle.loads(packet)  # noqa: S301 - from the process that began this one
                if task is None:
                    task = content
                    continue
                answer = pickle.dumps((False, task(content)), protocol=pickle.HIGHEST_PROTOCOL)
            except BaseException as error:  # noqa: BLE001 - it is raised over there
                answer = _as_answer(error)
            pipe.send_bytes(answer)


def _receive(pipe: Connection, packets: "SimpleQueue[bytes]") -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            packets.put(pipe.recv_bytes())
    os._exit(0)  # nobody waits for what is under way, which may never come to an end


def _as_answer(error: BaseException) -> bytes:
    """An error with its traceback, as it can be raised in another process."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(trace)
    try:
        answer = pickle.dumps((True, error))
        pickle.loads(answer)  # noqa: S301 - our own
    except BaseException:  # noqa: BLE001 - some errors cannot be sent as they are
        return pickle.dumps((True, RuntimeError(trace)))
    return answer
