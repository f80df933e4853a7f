"""What is recorded and replayed, and what happens where nothing can be; the real one is replayed in tests/gpu."""

from types import SimpleNamespace

import pytest

from job.kernels import recorded
from job.kernels.recorded import Recorder


@pytest.fixture
def done():
    return []


@pytest.fixture
def recorder(monkeypatch):
    """In place of the GPU's graphs: what was recorded is done when it is replayed."""
    told = []
    made = Recorder(wanted=True, on_failure=told.append)
    made.recordings = []

    def record(work):
        made.recordings.append(work)
        return SimpleNamespace(replay=lambda: work("replayed"))

    monkeypatch.setattr(made, "_recorded", record)
    made.told = told
    return made


def test_work_is_done_once_as_it_is_then_recorded_then_replayed(recorder, done):
    def work(how="done"):
        done.append(how)

    for _ in range(3):
        recorder.run("a", work)

    assert done == ["done", "replayed", "replayed"]
    assert recorder.recordings == [work]


def test_each_kind_has_its_own_recording_and_none_is_left_once_they_are_forgotten(recorder, done):
    for kind in ("a", "b", "a"):
        recorder.run(kind, lambda how="done", kind=kind: done.append((kind, how)))
    recorder.forget()
    recorder.run("a", lambda how="done": done.append(("a", how)))

    assert done == [("a", "done"), ("b", "done"), ("a", "replayed"), ("a", "done")]


def test_no_more_are_kept_than_there_is_memory_for(recorder, done, monkeypatch):
    monkeypatch.setattr(recorded, "_MOST", 2)
    for kind in (1, 2, 3, 3):
        recorder.run(kind, lambda how="done", kind=kind: done.append((kind, how)))

    assert done[2:] == [(3, "done"), (3, "done")]


def test_where_recording_fails_work_is_done_as_it_is_and_the_reason_is_told_once(monkeypatch, done):
    told = []

    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorded.torch.cuda, "graph_pool_handle", fails)
    recorder = Recorder(wanted=True, on_failure=told.append)
    for kind in ("a", "a", "b"):
        recorder.run(kind, lambda: done.append("done"))

    assert done == ["done"] * 3
    assert told == ["RuntimeError: operation not permitted when stream is capturing"]


def test_nothing_is_recorded_where_nothing_is_wanted(monkeypatch, done):
    recorder = Recorder(wanted=False, on_failure=done.append)
    monkeypatch.setattr(recorder, "_recorded", lambda _work: done.append("recorded"))
    for _ in range(2):
        recorder.run("a", lambda: done.append("done"))

    assert done == ["done", "done"]
