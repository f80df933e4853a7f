"""Attempts as processes, forked from a warm image or by the real command: what they say, and how they end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

PATIENCE_SECONDS = 900
"""Longest that anything here may take; nothing depends on how fast it is."""
_LOOK_SECONDS = 0.001
WARM_PROGRAM = Path(__file__).with_name("warm.py")


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
        self._read_to = 0
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
        with (self.folder / "stdout").open("rb") as file:
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


class Warm:
    """A process that has loaded the libraries; each attempt is a fork of it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # A background thread would not live through the fork; nothing here needs it.
        settings = {**environment, "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        self._child = subprocess.Popen(
            [sys.executable, str(WARM_PROGRAM)], env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._begun: dict[int, Future[int]] = {}
        self._ended: dict[int, Future[int]] = {}
        self._lock = threading.Lock()
        assert json.loads(self._child.stdout.readline() or "{}").get("ready"), "the warm image did not come up"
        threading.Thread(target=self._listen, daemon=True).start()

    def begin(self, arguments: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> Attempt:
        """Fork one; it has begun when this returns."""
        begun: Future[int] = Future()
        with self._lock:
            number = len(self._begun)
            self._begun[number] = begun
            order = {
                "order": number,
                "arguments": list(arguments),
                "environment": dict(environment),
                "folder": str(folder),
                "stdout": str(folder / "stdout"),
                "stderr": str(folder / "stderr"),
            }
            for name in ("stdout", "stderr"):
                (folder / name).touch()
            self._child.stdin.write(json.dumps(order) + "\n")
            self._child.stdin.flush()
        pid = begun.result(PATIENCE_SECONDS)
        return Attempt(pid, self._ended[number], folder)

    def close(self) -> None:
        """End it, and with it whatever it started."""
        self._child.stdin.close()
        self._child.wait(PATIENCE_SECONDS)

    def _listen(self) -> None:
        orders: dict[int, int] = {}
        for line in self._child.stdout:
            news = json.loads(line)
            if "begun" in news:
                number = orders[news["begun"]] = news["order"]
                self._ended[number] = Future()
                self._begun[number].set_result(news["begun"])
            else:
                self._ended[orders.pop(news["ended"])].set_result(os.waitstatus_to_exitcode(news["status"]))


@contextlib.contextmanager
def warm_image(environment: Mapping[str, str]) -> Iterator[Warm]:
    image = Warm(environment)
    try:
        yield image
    finally:
        image.close()


def begin_command(command: Sequence[str], *, environment: Mapping[str, str], folder: Path) -> Attempt:
    """The real command, as an operator starts it."""
    with (folder / "stdout").open("ab") as out, (folder / "stderr").open("ab") as err:
        child = subprocess.Popen(
            command, env=dict(environment), cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
    code: Future[int] = Future()
    threading.Thread(target=lambda: code.set_result(child.wait()), daemon=True).start()
    return Attempt(child.pid, code, folder)
