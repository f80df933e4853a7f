"""Memory that is given back and asked for anew in the middle of training is reported once."""

import pytest

from job.stages import loop as loops


@pytest.fixture
def notes(start, monkeypatch):
    """(retries so far, step by step) -> the report's notes after each."""

    def run(*retries):
        made = start(steps=len(retries))
        counts = iter(retries)
        monkeypatch.setattr(loops, "allocation_retries", lambda _device: next(counts))
        loop, seen = made.loop(), []
        step = loop._teller.step
        loop._teller.step = lambda record: (step(record), seen.append(len(loop._attempt.notes)))
        with loop._attempt.phases.phase("train"):
            loop.run()
        return seen, loop._attempt.notes

    return run


def test_the_first_steps_may_look_for_their_memory(notes):
    assert notes(1, 2, 3, 4, 5, 5, 5)[0] == [0] * 7


def test_later_it_is_reported_once(notes):
    seen, kept = notes(0, 0, 0, 0, 0, 0, 1, 2, 3)

    assert seen == [0] * 6 + [1] * 3
    assert "nearly full and in pieces" in kept[0]
