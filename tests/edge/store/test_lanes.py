"""Jobs on a few threads: what they leave when the block ends early."""

import threading

import pytest
from store_contract import never

from job.edge.store import lanes as module
from job.edge.store.lanes import Lanes
from job.edge.store.objects import PARALLEL


def test_after_a_failure_only_jobs_under_way_are_waited_for(monkeypatch):
    """A job that never began never ends either, and its wait would take the whole time allowed."""
    gate, waited = threading.Event(), []

    def wait(futures, timeout):
        waited.extend(futures)
        gate.set()

    lanes = Lanes("reading", never, settle_seconds=600)
    jobs = [lanes._submit(gate.wait) for _ in range(PARALLEL + 3)]
    while not all(job.running() for job in jobs[:PARALLEL]):
        pass
    monkeypatch.setattr(module, "wait", wait)
    with pytest.raises(KeyError), lanes:
        raise KeyError

    assert waited == jobs[:PARALLEL]
    assert [job.cancelled() for job in jobs] == [False] * PARALLEL + [True] * 3
