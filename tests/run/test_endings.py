"""Every end has its code and its outcome, also where nobody can be told of it on standard output."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import structlog
from job_process import ROOT

from job.cli import main
from job.core.errors import StalledError
from job.edge.host.interrupt import Interrupt
from job.edge.host.outcome import Outcome
from job.ending import Session

PATIENCE_LOOKS = 600
"""Ten a second: as long as a slow machine may take."""
STREAMS = {
    "closed": ">&-",
    "all closed": "<&- >&- 2>&-",
    "full": ">/dev/full",
    "all full": ">/dev/full 2>/dev/full",
    "unread": "| true",
}


def ended(file):
    outcome = json.loads(file.read_text(encoding="utf-8"))
    assert outcome["state"] == "ended"
    return outcome


@pytest.mark.parametrize("streams", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize(("content", "code"), [("model: {bese: x}\n", 64), (None, 64)])
def test_a_process_that_cannot_say_anything_ends_as_it_should(tmp_path, streams, content, code):
    recipe, outcome = tmp_path / "recipe.yaml", tmp_path / "outcome.json"
    if content is not None:
        recipe.write_text(content)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$@" {streams}', "job", sys.executable, "entrypoint.py", "check", recipe],
        cwd=ROOT,
        env={**os.environ, "JOB_OUTCOME_FILE": str(outcome)},
        check=False,
    )

    assert done.returncode == code
    assert ended(outcome)["code"] == code


def test_no_file_takes_the_place_of_a_stream_that_is_closed(tmp_path):
    script = (
        "from job.edge.host.output import open_standard_streams; import os, sys\n"
        "open_standard_streams()\n"
        "file = open(sys.argv[1], 'w'); assert file.fileno() > 2, file.fileno()\n"
        "os.write(1, b'a library prints'); print('so do we', flush=True); print('and', file=sys.stderr, flush=True)\n"
    )
    command = ["bash", "-c", '"$@" <&- >&- 2>&-', "job", sys.executable, "-c", script, tmp_path / "file"]

    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


class Panic(BaseException):
    """What a panic in a library's Rust becomes in Python: no Exception."""


@pytest.mark.parametrize("error", [Panic("index out of bounds"), SystemExit(3), MemoryError()], ids=repr)
def test_what_is_no_exception_is_a_bug_with_its_code(tmp_path, monkeypatch, capsys, error):
    def fails(*_):
        raise error

    monkeypatch.setattr("job.cli.make_attempt", fails)
    outcome = tmp_path / "outcome.json"
    monkeypatch.setenv("JOB_OUTCOME_FILE", str(outcome))
    monkeypatch.setattr(sys, "argv", ["entrypoint.py", "--log-format", "json", "check", str(Path(__file__))])

    assert main(Interrupt()) == 70
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit_code"] == 70


def test_the_outcome_does_not_wait_for_a_log_that_nobody_reads(tmp_path):
    gate, outcome = threading.Event(), tmp_path / "outcome.json"

    class Unread:
        def error(self, *_, **__):
            gate.wait()

    session = Session(interrupt=Interrupt(), outcome=Outcome(outcome))
    structlog.configure(logger_factory=lambda *_: Unread(), wrapper_class=None, processors=[])
    try:
        ending = threading.Thread(target=session.end, args=(StalledError("nothing moved"),), kwargs={"shown": False})
        ending.start()
        for _ in range(PATIENCE_LOOKS):
            if outcome.exists():
                break
            time.sleep(0.1)
        assert ended(outcome)["code"] == 83
        assert ending.is_alive()
    finally:
        gate.set()
        ending.join()
        structlog.reset_defaults()


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory")], ids=repr)
def test_memory_that_ran_out_is_said_with_what_to_do(tmp_path, monkeypatch, error):
    held = []

    def fails(*_):
        large = bytearray(8)
        held.append(sys._getframe())
        assert large is not None
        raise error

    monkeypatch.setattr("job.cli.make_attempt", fails)
    outcome = tmp_path / "outcome.json"
    arguments = ["entrypoint.py", "check", str(Path(__file__)), "--outcome-file", str(outcome)]
    monkeypatch.setattr(sys, "argv", arguments)

    assert main(Interrupt()) == 70
    assert "ran out" in ended(outcome)["reason"]
    assert "more memory" in ended(outcome)["action"]
    assert "large" not in held[0].f_locals  # what did not fit is let go before the end is written


def test_the_outcome_is_written_where_no_thread_can_be_begun(tmp_path, monkeypatch):
    def no_room(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_room)
    session = Session(interrupt=Interrupt(), outcome=Outcome(tmp_path / "outcome.json"))

    assert session.end(StalledError("nothing moved"), shown=True) == 83
    assert ended(tmp_path / "outcome.json")["code"] == 83


def test_a_log_that_fails_changes_neither_code_nor_outcome(tmp_path):
    class Failing:
        def error(self, *_, **__):
            raise ValueError("no log today")

    session = Session(interrupt=Interrupt(), outcome=Outcome(tmp_path / "outcome.json"))
    structlog.configure(logger_factory=lambda *_: Failing(), wrapper_class=None, processors=[])
    try:
        assert session.end(StalledError("nothing moved"), shown=False) == 83
    finally:
        structlog.reset_defaults()
    assert ended(tmp_path / "outcome.json")["code"] == 83
