"""How a process finds its place among the others, and what its end is called where one of them is gone."""

import threading
from types import SimpleNamespace

import pytest

from job.core.errors import PeerLostError, SickDeviceError, StopRequestedError
from job.stages.ranks import company


class Store:
    """A meeting's words: what stands under a key stays."""

    def __init__(self, rank, words):
        self.seat, self._words = SimpleNamespace(rank=rank), words

    def say(self, key, value):
        self._words.setdefault(key, value)

    def heard(self, key):
        return self._words.get(key)


def test_each_seat_is_taken_once():
    words = {}

    assert [company._met(Store(rank, words)).seat.rank for rank in range(3)] == [0, 1, 2]


def test_who_finds_its_seat_taken_has_come_to_an_attempt_that_is_over():
    """A node that was lost and is there again, while the first one still saves."""
    words = {}
    company._met(Store(1, words))

    with pytest.raises(StopRequestedError, match="still ends the attempt before"):
        company._met(Store(1, words))


@pytest.fixture
def left(monkeypatch):
    """A process that leaves with an error, whose sums were broken off or not, and what it ends with."""

    def left(error, *, broken_off, cause=None):
        made = company.Company.__new__(company.Company)
        made.world, made._left = SimpleNamespace(broken_off=broken_off), threading.Event()
        made._seat = SimpleNamespace(leads=True)
        monkeypatch.setattr(made, "_cause_of_a_loss", lambda: cause, raising=False)
        made.__exit__(type(error), error, None)

    return left


def test_what_was_computed_from_sums_that_were_broken_off_is_no_reason(left):
    """A proof that does not hold would blame the device, and a loss that is none the data."""
    wrong = SickDeviceError("the adapter in the store does not give the loss")
    with pytest.raises(PeerLostError, match="broken off") as caught:
        left(wrong, broken_off=True)
    assert caught.value.__cause__ is wrong
    said = {"rank": 1, "code": 81, "reason": "no room", "action": "a larger GPU"}
    with pytest.raises(Exception, match="no room"):
        left(wrong, broken_off=True, cause=said)


@pytest.mark.parametrize("error", [SickDeviceError("sick"), ValueError("wrong"), StopRequestedError("asked")])
def test_else_an_error_is_its_own_reason_and_so_is_a_stop_always(left, error):
    left(error, broken_off=isinstance(error, StopRequestedError))


def test_who_misses_another_one_and_knows_no_cause_says_so_itself(left):
    left(PeerLostError("gone"), broken_off=True)
