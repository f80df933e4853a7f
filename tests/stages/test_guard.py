"""What the watch over an attempt reports, also where a part of the reporting hangs."""

import threading
from types import SimpleNamespace

from job.core.errors import StalledError
from job.stages.attempts import guard as module
from job.stages.attempts.guard import Guard

PATIENCE_SECONDS = 60


def test_a_stall_is_reported_although_nobody_reads_its_log(monkeypatch):
    gate, ended = threading.Event(), []
    monkeypatch.setattr(module, "log", SimpleNamespace(error=lambda *_, **__: gate.wait()))
    monkeypatch.setattr(module, "_LOG_SECONDS", 0.05)
    guard = Guard(SimpleNamespace(grace_seconds=None, report_end=lambda error: ended.append(error) or error.code))
    reporter = threading.Thread(target=guard._stalled, args=("train", 9.0, "stacks"), daemon=True)
    reporter.start()
    reporter.join(PATIENCE_SECONDS)
    gate.set()

    assert [type(error) for error in ended] == [StalledError]
    assert "nothing moved for 9 s in phase train" in str(ended[0])


def test_word_is_left_of_a_stall_although_the_run_s_records_hang():
    gate, left = threading.Event(), threading.Event()
    attempt = SimpleNamespace(
        grace_seconds=None, report_end=lambda error: error.code, leave_word=lambda error: left.set()
    )
    guard = Guard(attempt)
    guard.end_records = lambda _: gate.wait()
    guard._end(StalledError("nothing moved"))
    reporter = threading.Thread(target=guard._leave_word, daemon=True)
    reporter.start()
    heard = left.wait(PATIENCE_SECONDS)
    gate.set()
    reporter.join()

    assert heard
