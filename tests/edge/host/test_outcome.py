"""The outcome file: what a scheduler reads, however hostile the place where it stands."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

from job.core.visible import visible
from job.edge.host.outcome import LIMIT_BYTES, Outcome

ROOT = Path(__file__).parents[3]


def read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    assert len(content) <= LIMIT_BYTES
    return json.loads(content.decode(), parse_constant=pytest.fail)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_progress_says_phase_step_loss_and_time_left(tmp_path):
    Outcome(tmp_path / "o.json").progress(phase="train", step=3, of=10, loss=1.5, eta_seconds=70)

    said = read(tmp_path / "o.json")
    assert said.pop("time").endswith("+00:00")
    assert said == {"state": "running", "phase": "train", "step": 3, "of": 10, "loss": 1.5, "eta_seconds": 70}


def test_the_end_says_code_reason_what_is_safe_and_what_to_do(tmp_path):
    outcome = Outcome(tmp_path / "o.json")
    outcome.progress(phase="train", step=7, of=10)
    outcome.end(
        again="no", code=75, reason="SIGTERM", last_committed_step=5, run_uri="s3://b/runs/r", action="start it again"
    )
    outcome.progress(phase="late")

    said = read(tmp_path / "o.json")
    assert {key: said[key] for key in ("state", "code", "reason", "last_committed_step", "run_uri", "action")} == {
        "state": "ended",
        "code": 75,
        "reason": "SIGTERM",
        "last_committed_step": 5,
        "run_uri": "s3://b/runs/r",
        "action": "start it again",
    }
    assert (said["phase"], said["step"]) == ("train", 7)


def test_steps_are_written_once_a_second_and_a_new_phase_at_once(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    outcome = Outcome(tmp_path / "o.json")

    seen = []
    for now, phase, step in [(100, "train", 1), (100.9, "train", 2), (101, "train", 3), (101.1, "evaluate", 3)]:
        clock[0] = now
        outcome.progress(phase=phase, step=step)
        said = read(tmp_path / "o.json")
        seen.append((said["phase"], said["step"]))

    assert seen == [("train", 1), ("train", 1), ("train", 3), ("evaluate", 3)]


def test_a_loss_that_is_not_finite_leaves_valid_json(tmp_path):
    Outcome(tmp_path / "o.json").progress(phase="train", loss=float("nan"), eta_seconds=float("inf"))

    assert read(tmp_path / "o.json")["loss"] is None


@pytest.mark.parametrize("text", ["x" * 9000, "🦙" * 3000, '\n"\\' * 3000, "\x00" * 3000, "file \udcff" * 900])
def test_a_long_reason_is_cut_to_the_limit_between_characters(tmp_path, text):
    Outcome(tmp_path / "o.json").end(again="no", code=70, reason=text, run_uri="s3://b/r", action="report it")

    said = read(tmp_path / "o.json")
    assert (said["code"], said["run_uri"], said["action"]) == (70, "s3://b/r", "report it")
    assert said["reason"].endswith("…")
    assert visible(text).startswith(said["reason"][:-1])
    assert (tmp_path / "o.json").stat().st_size > LIMIT_BYTES - 16


def test_all_texts_too_long_at_once_still_fit(tmp_path):
    Outcome(tmp_path / "o.json").end(again="no", code=70, reason="r" * 5000, action="a" * 5000, run_uri="u" * 5000)

    assert read(tmp_path / "o.json")["code"] == 70


def test_secrets_in_the_reason_are_hidden(tmp_path):
    Outcome(tmp_path / "o.json").end(again="no", code=69, reason="GET https://s3/x?X-Amz-Signature=abcdef0123 failed")

    assert "abcdef0123" not in (tmp_path / "o.json").read_text()


def test_a_reader_never_sees_anything_but_a_whole_file(tmp_path):
    path = tmp_path / "o.json"
    outcome = Outcome(path)
    outcome.progress(phase="a")
    with path.open("rb") as held:
        outcome.progress(phase="b" * 500)

        assert json.loads(held.read())["phase"] == "a"  # the old file, not one under rewriting
    assert names(tmp_path) == ["o.json"]


def test_where_nothing_can_be_made_beside_it_the_file_is_rewritten_in_place(tmp_path):
    path = tmp_path / "o.json"
    path.write_text("x" * 1000)
    number = path.stat().st_ino
    (tmp_path / f".o.json.{os.getpid()}.tmp").mkdir()  # in the way of the new file, for root too

    outcome = Outcome(path)
    outcome.progress(phase="a long name " * 20)
    outcome.progress(phase="b")
    said = read(path)
    outcome.end(again="no", code=0, reason="done")

    assert said["phase"] == "b"
    assert (read(path)["code"], path.stat().st_ino) == (0, number)


IN_PLACE = """
import sys
from pathlib import Path
from job.edge.host.outcome import Outcome
outcome = Outcome(Path(sys.argv[1]))
outcome.progress(phase="train", step=1)
outcome.end(again="no", code=75, reason="SIGTERM")
"""


def test_a_file_that_is_mounted_as_a_termination_log_is_written(tmp_path):
    """Renaming over a bind mount fails with EBUSY, and a copy beside it would be read by nobody."""
    log, mounted = tmp_path / "termination-log", tmp_path / "on the node"
    log.touch()
    mounted.touch()
    bind = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$2"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", bind, "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    probe = subprocess.run([*command, mounted, log, "sh", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("no mount namespaces here")

    done = subprocess.run(
        [*command, mounted, log, sys.executable, IN_PLACE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert "outcome_not_written" not in done.stdout
    assert read(mounted)["code"] == 75
    assert log.read_bytes() == b""  # the node's file was written, not the one below the mount
    assert names(tmp_path) == ["on the node", "termination-log"]


@pytest.mark.parametrize("where", ["file/o.json", "folder", "pipe"])
def test_a_place_that_cannot_be_written_costs_one_warning_and_never_the_job(tmp_path, where):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    outcome = Outcome(tmp_path / where)

    with structlog.testing.capture_logs() as events:
        outcome.progress(phase="a")
        outcome.progress(phase="b")
        outcome.end(again="no", code=0, reason="done")

    assert [event["event"] for event in events] == ["outcome_not_written"]
    assert names(tmp_path) == ["file", "folder", "pipe"]


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target.json")

    Outcome(tmp_path / "link").end(again="no", code=0, reason="done")

    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "target.json")["code"] == 0


def test_missing_folders_are_made_and_the_file_can_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    Outcome(tmp_path / "a" / "b" / "o.json").end(again="no", code=0, reason="done")
    os.umask(before)

    assert stat.S_IMODE((tmp_path / "a" / "b" / "o.json").stat().st_mode) == 0o644


def test_without_a_path_nothing_is_written_and_nothing_is_said():
    outcome = Outcome(None)

    with structlog.testing.capture_logs() as events:
        outcome.progress(phase="a")
        outcome.end(again="no", code=0, reason="done")

    assert not events


def test_what_is_safe_is_said_at_once_and_stays_while_it_goes_on(tmp_path, monkeypatch):
    """A process that is killed next says nothing more."""
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    outcome = Outcome(tmp_path / "o.json")
    outcome.progress(phase="train", step=1, of=9)
    outcome.safe(run_uri="s3://b/runs/r", last_committed_step=None)
    assert read(tmp_path / "o.json")["run_uri"] == "s3://b/runs/r"
    outcome.safe(run_uri="s3://b/runs/r", last_committed_step=4)
    outcome.progress(phase="evaluate")

    said = read(tmp_path / "o.json")
    assert (said["state"], said["phase"]) == ("running", "evaluate")
    assert (said["run_uri"], said["last_committed_step"]) == ("s3://b/runs/r", 4)


def test_what_is_safe_is_said_no_more_after_the_end(tmp_path):
    outcome = Outcome(tmp_path / "o.json")
    outcome.end(code=75, again="yes", reason="r", last_committed_step=2)
    outcome.safe(run_uri="s3://b/runs/r", last_committed_step=4)

    assert read(tmp_path / "o.json")["last_committed_step"] == 2


def test_followers_hear_all_of_it_also_without_a_file():
    heard = []
    outcome = Outcome(None)
    outcome.follow(heard.append)
    outcome.progress(phase="train", step=1, of=3)
    outcome.progress(phase="train", step=2, of=3)  # within the second
    outcome.progress(phase="train", step=3, of=3)  # the last one
    outcome.end(code=0, again="-", reason="done")

    assert [(said["state"], said.get("step")) for said in heard] == [("running", 1), ("running", 3), ("ended", 3)]
