"""An S3 server that dies: ministack as a process, killed by SIGKILL and started again with its data on its port."""

import contextlib
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import S3Server, free_port

PROGRAM = Path(__file__).with_name("whole_requests.py")
_START_SECONDS = 120
_CLOSE_WAIT = "08"
"""Of a connection whose other end has gone, in /proc/net/tcp."""
_FACTS = ".meta.json"
"""What ministack keeps beside an object."""
_ACCOUNT = "000000000000"


class MortalServer:
    """ministack over http; what it has answered for stands on its disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._child: subprocess.Popen | None = None
        self.at = S3Server(endpoint=f"http://127.0.0.1:{self._port}")
        self._started = 0.0
        self.deaths = 0
        self.longest_away_seconds = 0.0

    def start(self) -> None:
        self._recover()
        self._started = time.time()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "JOB_"))} | {
            "GATEWAY_PORT": str(self._port),
            "BIND_HOST": "127.0.0.1",
            "S3_PERSIST": "1",
            "S3_DATA_DIR": str(self._folder / "objects"),
            "TMPDIR": str(self._folder),
            "LOG_LEVEL": "ERROR",
        }
        with (self._folder / "server.log").open("ab") as log:
            self._child = subprocess.Popen(
                [sys.executable, str(PROGRAM)],
                env=environment,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._child.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
                return
            time.sleep(0.02)
        raise RuntimeError(f"the server did not start: {(self._folder / 'server.log').read_text()[-2000:]}")

    def kill(self) -> None:
        os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    def die_and_come_back(self, *, away_seconds: float) -> None:
        began = time.monotonic()
        self.kill()
        time.sleep(away_seconds)
        self.start()
        self.deaths += 1
        self.longest_away_seconds = max(self.longest_away_seconds, time.monotonic() - began)

    def settle(self) -> None:
        """Wait until all that killed processes had sent is done, or is gone with the server."""
        deadline = time.monotonic() + _START_SECONDS
        while self._has_orphaned_connections():
            assert time.monotonic() < deadline, "a connection of a process that was killed stays open"
            time.sleep(0.05)  # a look costs the kernel ten milliseconds
        with contextlib.suppress(OSError, http.client.HTTPException):  # it is answered after what came before it
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_START_SECONDS)
            with contextlib.closing(connection):
                connection.request("HEAD", "/")
                connection.getresponse()

    def _has_orphaned_connections(self) -> bool:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        return any(row[1].endswith(f":{self._port:04X}") and row[3] == _CLOSE_WAIT for row in rows)

    def bucket(self, name: str) -> Path:
        """Where the objects of a bucket stand on the server's disk."""
        return self._folder / "objects" / _ACCOUNT / name

    def _recover(self) -> None:
        """What a server's journal does: a write that was under way when it died is done, or it is not.

        ministack replaces an object's content and then its metadata. Of the two, the content is what counts.
        """
        written = [p for p in (self._folder / "objects").rglob("*") if p.stat().st_mtime >= self._started - 1]
        for path in written:
            if path.suffix == ".tmp":
                path.unlink()
        for path in {p if p.name.endswith(_FACTS) else p.with_name(p.name + _FACTS) for p in written if p.is_file()}:
            if not path.is_file():
                continue
            content = path.with_name(path.name.removesuffix(_FACTS))
            etag = hashlib.md5(content.read_bytes()).hexdigest() if content.is_file() else None
            with contextlib.suppress(ValueError):
                if json.loads(path.read_text())["etag"].strip('"') == etag:
                    continue
            path.unlink()


@contextlib.contextmanager
def mortal_server(folder: Path) -> Iterator[MortalServer]:
    server = MortalServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def dying_at_random(
    server: MortalServer, draw: random.Random, *, between_seconds: tuple[float, float]
) -> Iterator[None]:
    """Meanwhile the server is killed and started again, over and over."""
    over = threading.Event()
    failure: list[BaseException] = []

    def die() -> None:
        while not over.wait(draw.uniform(*between_seconds)):
            try:
                server.die_and_come_back(away_seconds=draw.uniform(0.0, 1.5))
            except BaseException as error:
                failure.append(error)
                raise

    thread = threading.Thread(target=die)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failure:
        pytest.fail(f"the server did not come back: {failure[0]}")
