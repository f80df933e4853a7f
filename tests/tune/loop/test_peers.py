"""A process that is killed is missed by those who wait for nothing of it: they may be waiting for their device."""

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from job_process import environment_without_job
from torch.distributed import TCPStore

from job.tune import ranks

PROGRAM = """
import os, sys, time
import torch
from job.core.attempt.seat import Seat
from job.tune.ranks import Meeting
rank, port = map(int, sys.argv[1:3])
seat = Seat(rank=rank, size=3, local_rank=rank, node=0, nodes=1, host="127.0.0.1", port=port, folder="", supervisor=0)
world = Meeting(seat).join(torch.device("cpu"), patience=lambda: 300.0)
world.sum_in_order([torch.ones(3)])
print("joined", world.lost, flush=True)
while not world.lost:
    time.sleep(0.05)
print("missed", flush=True)
time.sleep(600)
"""


@pytest.fixture
def three(tmp_path, warm):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    begun = []
    for rank in range(3):
        with (tmp_path / f"{rank}.out").open("wb") as out:
            options = {"environment": environment_without_job({}), "cwd": tmp_path, "stdout": out, "stderr": out}
            begun.append(warm.begin([str(rank), str(store.port)], code=PROGRAM, **options))
    yield begun
    for child in begun:
        child.kill()


def says(folder, rank, what):
    """Waits for it, as long as any machine takes."""
    path, until = Path(folder, f"{rank}.out"), time.monotonic() + 300
    while what not in path.read_text().split():
        assert "Error" not in path.read_text(), path.read_text()
        assert time.monotonic() < until, path.read_text()
        time.sleep(0.05)
    return path.read_text()


@pytest.mark.parametrize(("killed", "missed_by"), [(2, 0), (0, 1)])
def test_one_that_is_killed_is_missed_by_rank_0_and_rank_0_by_the_others(three, tmp_path, killed, missed_by):
    for rank in range(3):
        assert "True" not in says(tmp_path, rank, "joined")
    os.kill(three[killed].pid, signal.SIGKILL)

    assert says(tmp_path, missed_by, "missed")


# --- what waits on a device for one that is gone ---------------------------------------------------------------------


class Group:
    """Of a device: what it was given last passes once it is broken off."""

    def __init__(self, *, passes):
        self.passes, self.aborted = passes, 0

    def is_completed(self):
        return self.passes

    def abort(self):
        self.aborted += 1


@pytest.mark.parametrize("sharded", [False, True])
def test_what_a_device_waits_for_in_vain_is_broken_off_and_said_to_be(monkeypatch, sharded):
    """A call of CUDA's that waits for the device hears of nothing else."""
    monkeypatch.setattr(ranks, "_STUCK_SECONDS", 0.01)
    sums, rows, seen = Group(passes=False), Group(passes=False), []
    world = ranks.Ranks.__new__(ranks.Ranks)
    world.broken_off, world._levels, world._rows = False, [(sums, 2), (sums, 2)], rows if sharded else None
    monkeypatch.setattr(sums, "abort", lambda: seen.append(world.broken_off))
    world._on_device = [Group(passes=True), sums]
    world._free_device()

    assert seen == [True]  # once, and said before
    assert rows.aborted == sharded


def test_a_device_that_waits_for_nothing_is_left_alone_until_it_does(monkeypatch):
    monkeypatch.setattr(ranks, "_STUCK_SECONDS", 0.01)
    sums, looks = Group(passes=True), []

    def passes():
        looks.append(world.broken_off)
        return len(looks) < 3

    world = ranks.Ranks.__new__(ranks.Ranks)
    world.broken_off, world._levels, world._rows, world._on_device = False, [(sums, 2)], None, [sums]
    monkeypatch.setattr(sums, "is_completed", passes)
    world._free_device()

    assert looks == [False] * 3
    assert sums.aborted == 1


class Gathers:
    """In the place of torch.distributed: what is begun passes when it is said to."""

    def __init__(self):
        self.begun = []

    def all_gather_into_tensor(self, _row, _part, group=None, async_op=False):
        assert async_op
        self.begun.append(Group(passes=False))
        self.begun[-1].wait = lambda *_patience: None
        return self.begun[-1]


def test_a_row_that_was_begun_ahead_holds_the_device_after_an_older_one_was_waited_for(monkeypatch):
    """The next layer is gathered while this one is waited for: the younger one may be the one that never comes."""
    monkeypatch.setattr(ranks, "_STUCK_SECONDS", 0.01)
    world = ranks.Ranks.__new__(ranks.Ranks)
    world._dist, world._rows, world._levels, world._on_gpu = (gathers := Gathers()), Group(passes=True), [], True
    world.size, world.bytes_sent, world._on_device, world.broken_off = 2, 0, [], False
    part, row = torch.zeros(1), torch.zeros(2)
    older = world.gather_row(part, row)
    world.gather_row(part, row)
    older()
    gathers.begun[0].passes = True
    freeing = threading.Thread(target=world._free_device, daemon=True)  # it looks for as long as nothing waits
    freeing.start()
    freeing.join(60)
    assert world.broken_off

    gathers.begun[1].passes = True
    world.gather_row(part, row)
    assert world._on_device == gathers.begun[2:]  # what has passed is not kept
