"""Work in several processes: in order, stopped at once, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from job.core.errors import DataError, JobError, StopRequestedError
from job.edge import workers
from job.edge.workers import in_order

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Deed:
    """A task for a worker process."""

    name: str
    at: int = 20

    def __call__(self, item):
        if item != self.at:
            return os.getpid(), item
        match self.name:
            case "data":
                raise DataError(f"item {item}")
            case "memory":
                raise MemoryError
            case "not to be pickled":
                raise type("Strange", (Exception,), {})(f"item {item}")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "left":
                os._exit(3)
            case "stop signals":
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                    os.kill(os.getpid(), number)
            case "large":
                return os.getpid(), b"x" * 10**7
        return os.getpid(), item


@pytest.fixture(autouse=True)
def several(monkeypatch):
    """Even small items are worth a process."""
    monkeypatch.setattr(workers, "ALONE_BYTES", 2)


def done(task, items=40, *, count=2, size=1, should_stop=lambda: False):
    return in_order(
        task, range(items), workers=count, size_of=lambda _: size, should_stop=should_stop, doing="trying this"
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(count):
    found = list(done(Deed("nothing"), count=count))
    assert [item for _, item in found] == [*range(40)]
    assert (os.getpid() in {pid for pid, _ in found}) is (count == 1)


def test_few_items_are_left_to_this_process():
    assert {pid for pid, _ in done(Deed("nothing"), items=2, count=3)} == {os.getpid()}


def test_large_results_and_large_items_pass_each_other():
    """Neither process waits for the other to read."""
    items = [bytes([n]) * 3_000_000 for n in range(12)]
    found = in_order(_twice, items, workers=2, size_of=len, should_stop=lambda: False, doing="trying this")
    assert [len(each) for each in found] == [6_000_000] * 12


def _twice(item):
    return item * 2


def test_an_error_of_the_task_is_raised_here():
    with pytest.raises(DataError, match="item 20") as raised:
        list(done(Deed("data")))
    assert "in __call__" in raised.value.__notes__[0]  # where it happened over there
    with pytest.raises(MemoryError):
        list(done(Deed("memory")))
    with pytest.raises(RuntimeError, match="Strange: item 20"):
        list(done(Deed("not to be pickled")))


@pytest.mark.parametrize(("deed", "how"), [("killed", "signal 9"), ("left", "exit code 3")])
def test_a_process_that_ends_by_itself_is_an_error_that_says_how(deed, how):
    with pytest.raises(JobError, match=f"{how}.*while trying this.*lack of memory") as raised:
        list(done(Deed(deed)))
    assert "more memory" in raised.value.action


def test_a_request_to_stop_ends_the_processes_and_is_not_theirs_to_see():
    assert len(list(done(Deed("stop signals")))) == 40
    asked = []
    found = done(Deed("nothing"), items=10**9, should_stop=lambda: bool(asked))
    pid, _ = next(found)
    asked.append(True)
    with pytest.raises(StopRequestedError, match="while trying this"):
        list(found)
    assert not Path(f"/proc/{pid}").exists()


def test_no_process_is_left_when_the_results_are_no_longer_wanted():
    found = done(Deed("nothing"), items=10**9)
    pid, _ = next(found)
    found.close()
    assert not Path(f"/proc/{pid}").exists()


def test_no_more_is_read_ahead_than_memory_allows(monkeypatch):
    monkeypatch.setattr(workers, "_UNDER_WAY_BYTES", 5)
    read = []

    def items():
        for number in range(30):
            read.append(number)
            yield number

    found = in_order(
        Deed("nothing"), items(), workers=3, size_of=lambda _: 2, should_stop=lambda: False, doing="trying this"
    )
    for number, (_, item) in enumerate(found):
        assert item == number
        assert len(read) <= number + 6


def test_the_processes_end_with_the_one_that_began_them():
    """However it ends: nobody closes anything after a SIGKILL."""
    program = (
        "from job.edge import workers; import os, builtins\n"
        "workers.ALONE_BYTES = 2\n"
        "found = workers.in_order(os.getpgid, iter(lambda: 0, 1), workers=2, size_of=lambda _: 1,\n"
        "                         should_stop=lambda: False, doing='trying this')\n"
        "next(found)\n"
        "print(*[open(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read()], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    pids = ended.stdout.split()
    assert len(pids) == 2, ended.stderr
    while any(_runs(pid) for pid in pids):
        time.sleep(0.01)


def _runs(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
