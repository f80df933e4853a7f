"""A real Ceph and a real Swift as processes of this machine; each gives its address over http and over https."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Certificates, S3Server

HERE = Path(__file__).parent
SWIFT_PROGRAMS = HERE.parents[1] / ".lab" / "swift" / "bin"
"""Where install.sh puts Swift: packages of its own, which the job's locks know nothing of."""
SCHEMES = ("http", "https")
_START_SECONDS = 240


@contextlib.contextmanager
def ceph(folder: Path, certificates: Certificates) -> Iterator[dict[str, S3Server]]:
    _refuse_missing(shutil.which("radosgw"), "Ceph")
    first = _free_ports(3)
    arguments = [first, first + 1, first + 2, certificates.certificate, certificates.key, "AKIATEST", "test-secret"]
    with _up("ceph", folder, arguments):
        yield _addresses(first, certificates, access="AKIATEST", secret="test-secret")


@contextlib.contextmanager
def swift(folder: Path, certificates: Certificates) -> Iterator[dict[str, S3Server]]:
    _refuse_missing((SWIFT_PROGRAMS / "swift-proxy-server").exists() and shutil.which("memcached"), "Swift")
    first = _free_ports(6)
    with _up("swift", folder, [SWIFT_PROGRAMS, first, certificates.certificate, certificates.key, "test-secret"]):
        yield _addresses(first, certificates, access="test:tester", secret="test-secret")


@contextlib.contextmanager
def _up(name: str, folder: Path, arguments: list[object]) -> Iterator[None]:
    try:
        subprocess.run([HERE / f"{name}_up.sh", folder, *map(str, arguments)], check=True, timeout=_START_SECONDS)
        yield
    finally:
        subprocess.run([HERE / f"{name}_down.sh", str(folder)], check=True, timeout=120)


def _addresses(first: int, certificates: Certificates, **credentials: str) -> dict[str, S3Server]:
    """The http port is the first one, https the next."""
    plain = S3Server(endpoint=f"http://127.0.0.1:{first}", **credentials)
    secure = S3Server(endpoint=f"https://127.0.0.1:{first + 1}", authority=certificates.authority, **credentials)
    return {"http": plain, "https": secure}


def _refuse_missing(found: object, name: str) -> None:
    if not found:
        pytest.fail(f"there is no {name} on this machine; run {HERE / 'install.sh'} as root")


def _free_ports(count: int) -> int:
    """First of several free ports in a row, below those that the kernel gives to clients."""
    for first in range(14000 + os.getpid() % 4000, 20000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError(f"no {count} free ports in a row")
