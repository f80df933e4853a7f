"""Attempts as processes, forked from a warm image or by the real command: what they say, and how they end."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from warm_image import PATIENCE_SECONDS, WarmImage

_LOOK_SECONDS = 0.002


class Attempt:
    """A process that works on a run; `folder` holds its output and its outcome file."""

    def __init__(self, pid: int, code: "Future[int]", folder: Path) -> None:
        self.pid = pid
        self.folder = folder
        self._code = code
        try:
            self._handle = os.pidfd_open(pid)
        except ProcessLookupError:  # ended already
            self._handle = None
        self._read_to = self._seen_bytes = 0
        self._events: list[dict] = []

    @property
    def ended(self) -> bool:
        return self._code.done()

    def wait(self) -> int:
        """Its exit code; of one that a signal ended, the signal's number below zero."""
        code = self._code.result(PATIENCE_SECONDS)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        return code

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> int:
        self.send(signal.SIGKILL)
        return self.wait()

    def events(self) -> list[dict]:
        """Its JSON lines so far; the last line of a killed process may be a part of one."""
        path = self.folder / "stdout"
        if path.stat().st_size == self._seen_bytes:  # as nearly always: it is asked hundreds of times a second
            return self._events
        with path.open("rb") as file:
            self._seen_bytes = os.fstat(file.fileno()).st_size
            file.seek(self._read_to)
            *lines, _part = file.read().split(b"\n")
        self._read_to += sum(len(line) + 1 for line in lines)
        self._events += map(json.loads, lines)
        return self._events

    def named(self, name: str) -> list[dict]:
        return [event for event in self.events() if event["event"] == name]

    def until(self, seen: Callable[[], bool]) -> bool:
        """Wait for something; False when the process ended before it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not seen():
            if self.ended:
                return seen()
            if time.monotonic() > deadline:
                raise TimeoutError(f"not seen in {PATIENCE_SECONDS} s:\n{self.told()}")
            time.sleep(_LOOK_SECONDS)
        return True

    def until_event(self, event: str, *, passage: int = 1, **values: object) -> bool:
        """Wait for the n-th event of a kind with these values."""

        def seen() -> bool:
            found = [e for e in self.named(event) if all(e.get(key) == value for key, value in values.items())]
            return len(found) >= passage

        return self.until(seen)

    def until_frozen(self) -> bool:
        """Wait until the system says that it is stopped."""
        return self.until(lambda: self._state() == "T")

    def _state(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return ""

    @property
    def outcome(self) -> dict:
        return json.loads((self.folder / "outcome.json").read_text())

    def told(self) -> str:
        """All of its output, for messages."""
        return (self.folder / "stdout").read_text()[-6000:] + (self.folder / "stderr").read_text()[-3000:]


def begin_fork(
    image: WarmImage,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    stdout: Path | None = None,
) -> Attempt:
    """A fork of the warm image; `stdout`: another file for its output, of which no event is seen."""
    (folder / "stdout").touch()
    with (stdout or folder / "stdout").open("wb") as out, (folder / "stderr").open("ab") as err:
        child = image.begin(arguments, environment=environment, cwd=folder, stdout=out, stderr=err)
    return Attempt(child.pid, child.ended, folder)


def begin_command(command: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> Attempt:
    """The real command, as an operator starts it."""
    with (folder / "stdout").open("ab") as out, (folder / "stderr").open("ab") as err:
        child = subprocess.Popen(
            command, env=dict(environment), cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
    code: Future[int] = Future()
    threading.Thread(target=lambda: code.set_result(child.wait()), daemon=True).start()
    return Attempt(child.pid, code, folder)
