"""Processes forked from a warm image (see warm.py): begun like real ones, without the seconds that imports take."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO

PATIENCE_SECONDS = 900
"""Longest that anything here may take; nothing depends on how fast it is."""
PROGRAM = Path(__file__).with_name("warm.py")
PAGE_BYTES = 4096
"""Of the pipe that an output is read through: while nobody reads it, the process cannot run far."""
_NEWS_BYTES = 1 << 12


class Forked:
    """A process of the image, with as much of subprocess.Popen as the tests use."""

    def __init__(self, pid: int, ended: "Future[int]", stdout: IO[str] | None) -> None:
        self.pid = pid
        self.stdout = stdout
        self.ended = ended
        """Its exit code; of one that a signal ended, the signal's number below zero."""
        try:
            self._handle = os.pidfd_open(pid)
        except ProcessLookupError:  # ended already
            self._handle = None

    def poll(self) -> int | None:
        return self.ended.result() if self.ended.done() else None

    def wait(self, timeout: float = PATIENCE_SECONDS) -> int:
        code = self.ended.result(timeout)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        return code

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmImage:
    """A process that has loaded the libraries; whatever begins here is a fork of it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # A background thread would not live through the fork, and a driver that was asked for its GPUs gives a fork
        # none; nothing here needs either.
        settings = {**environment, "JE_ARROW_MALLOC_CONF": "background_thread:false", "CUDA_VISIBLE_DEVICES": ""}
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, str(PROGRAM)], env=settings, stdin=theirs, stdout=subprocess.DEVNULL
            )
        self._begun: list[Future[int]] = []
        self._ended: dict[int, Future[int]] = {}
        self._lock = threading.Lock()
        assert self._orders.recv(_NEWS_BYTES), "the warm image did not come up"
        threading.Thread(target=self._listen, daemon=True).start()

    def begin(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: Path,
        stdout: IO | int,
        stderr: IO,
        user: int | None = None,
        code: str | None = None,
        forget: Collection[str] = (),
    ) -> Forked:
        """Begin what entrypoint.py does with these arguments; it is under way when this returns.

        Args:
            arguments: of the command line.
            environment: all of it.
            cwd: where it is begun.
            stdout: a file; subprocess.PIPE: a pipe of one page.
            stderr: a file.
            user: who it is from then on.
            code: what runs instead, as by `python -c`.
            forget: packages that it imports anew.
        """
        order = {"arguments": [*arguments], "environment": {**environment}, "folder": str(cwd)}
        order |= {"user": user, "code": code, "forget": [*forget]}
        with contextlib.ExitStack() as ours:
            nothing = ours.enter_context(Path(os.devnull).open("rb"))
            reader = None
            if stdout == subprocess.PIPE:
                read_end, write_end = os.pipe()
                fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PAGE_BYTES)
                reader = os.fdopen(read_end)
                stdout = ours.enter_context(os.fdopen(write_end, "wb"))
            with self._lock:
                number = len(self._begun)
                self._begun.append(Future())
                packet = json.dumps({**order, "order": number}).encode()
                socket.send_fds(self._orders, [packet], [each.fileno() for each in (nothing, stdout, stderr)])
        pid = self._begun[number].result(PATIENCE_SECONDS)
        return Forked(pid, self._ended[number], reader)

    def close(self) -> None:
        """End it, and with it whatever it started."""
        self._orders.shutdown(socket.SHUT_WR)
        self._child.wait(PATIENCE_SECONDS)
        self._orders.close()

    def _listen(self) -> None:
        orders: dict[int, int] = {}
        while packet := self._orders.recv(_NEWS_BYTES):
            news = json.loads(packet)
            if "begun" in news:
                number = orders[news["begun"]] = news["order"]
                self._ended[number] = Future()
                self._begun[number].set_result(news["begun"])
            else:
                self._ended[orders.pop(news["ended"])].set_result(os.waitstatus_to_exitcode(news["status"]))
        for future in (*self._begun, *self._ended.values()):
            if not future.done():
                future.set_exception(RuntimeError("the warm image has ended"))


@contextlib.contextmanager
def warm_image(environment: Mapping[str, str]) -> Iterator[WarmImage]:
    image = WarmImage(environment)
    try:
        yield image
    finally:
        image.close()
