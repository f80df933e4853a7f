"""Jobs on a few threads: what they leave when the block ends early."""

import threading
from contextlib import nullcontext

import pytest
from store_contract import never

from job.core.errors import UnavailableError
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


@pytest.mark.parametrize(("jumps", "ends"), [(1, False), (400, True)], ids=["frozen once", "silent all the time"])
def test_time_in_which_this_process_was_frozen_is_no_silence(monkeypatch, jumps, ends):
    """The clock jumps by ten minutes: at one look, or at each of them."""
    ahead, left = [0.0], [jumps]

    class Clock:
        @staticmethod
        def monotonic():
            if left[0]:
                left[0] -= 1
                ahead[0] += 600.0
            return ahead[0]

    monkeypatch.setattr(module, "time", Clock)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.001)
    gate, looks = threading.Event(), []

    def should_stop():
        looks.append(1)
        if len(looks) == 350:  # looks enough for as many seconds
            gate.set()
        return False

    with (
        Lanes("reading", should_stop, silence_seconds=300.0) as lanes,
        pytest.raises(UnavailableError) if ends else nullcontext(),
    ):
        lanes.run(gate.wait)
    gate.set()
