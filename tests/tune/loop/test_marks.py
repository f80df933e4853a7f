"""Who waits for a device that itself waits for a rank that is gone gives up; alone it is waited for as ever."""

from types import SimpleNamespace

import pytest

from job.core.errors import PeerLostError
from job.tune.loop import marks
from job.tune.loop.marks import wait_for
from job.tune.world import ALONE


class Event:
    """Of a device that comes there after so many looks."""

    def __init__(self, looks):
        self.looks, self.synchronized = looks, 0

    def query(self):
        self.looks -= 1
        return self.looks < 0

    def synchronize(self):
        self.synchronized += 1


def test_alone_it_is_waited_for_in_one_call():
    event = Event(3)
    wait_for(event, ALONE)

    assert (event.synchronized, event.looks) == (1, 3)


@pytest.mark.parametrize("lost", [False, True])
def test_what_comes_is_waited_for_also_once_a_rank_is_lost(lost):
    event = Event(3)
    wait_for(event, SimpleNamespace(size=2, lost=lost, broken_off=False))

    assert event.looks == -1


def test_what_never_comes_is_given_up_once_a_rank_is_lost(monkeypatch):
    monkeypatch.setattr(marks, "_LOST_SECONDS", 0.01)
    with pytest.raises(PeerLostError, match="this device waits for it"):
        wait_for(Event(10**9), SimpleNamespace(size=2, lost=True, broken_off=False))


def test_what_comes_only_because_sums_were_broken_off_is_not_taken():
    with pytest.raises(PeerLostError, match="broken off"):
        wait_for(Event(0), SimpleNamespace(size=2, lost=True, broken_off=True))


def test_a_moment_on_the_host_is_past():
    wait_for(1.0, SimpleNamespace(size=2, lost=True))
