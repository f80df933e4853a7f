"""Memory that is given back and asked for anew in the middle of training is told once."""

from types import SimpleNamespace

import pytest
import torch

from job.stages import training
from job.stages.training import Training


@pytest.fixture
def told(monkeypatch):
    """Makes a step with so many retries so far; gives the notes of the report."""
    counts = []
    monkeypatch.setattr(training, "allocation_retries", lambda _device: counts[-1])
    attempt = SimpleNamespace(notes=[])
    stage = Training.__new__(Training)
    stage._attempt, stage._setting = attempt, SimpleNamespace(device=torch.device("cuda"))
    stage._told_of_memory = False
    run = SimpleNamespace(allocation_retries=0, step_seconds=[])

    def step(retries):
        counts.append(retries)
        run.step_seconds.append(0.1)
        stage._notice_full_memory(run)
        return attempt.notes

    return step


def test_the_first_steps_may_look_for_their_memory(told):
    assert [len(told(retries)) for retries in (1, 2, 3, 4, 5, 5, 5)] == [0] * 7


def test_later_it_is_told_once(told):
    for retries in (0, 0, 0, 0, 0, 0, 1, 2, 3):
        notes = told(retries)

    assert len(notes) == 1
    assert "nearly full and in pieces" in notes[0]
