"""How a process finds its place among the others."""

from types import SimpleNamespace

import pytest

from job.core.errors import StopRequestedError
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
