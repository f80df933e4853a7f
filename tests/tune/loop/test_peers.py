"""A process that is killed is missed by those who wait for nothing of it: they may be waiting for their device."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
from job_process import environment_without_job
from torch.distributed import TCPStore

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
