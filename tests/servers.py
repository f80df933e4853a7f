"""S3 servers as processes of their own, on free ports, over http and https."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import trustme
from botocore.config import Config

ACCESS, SECRET = "testing", "testing-secret"
ATOMIC_MOTO = Path(__file__).with_name("atomic_moto.py")
_START_SECONDS = 60
KINDS = ("moto-http", "moto-https", "ministack-http", "ministack-https")


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server and what a client needs to know about it."""

    endpoint: str
    access: str = ACCESS
    secret: str = SECRET
    authority: Path | None = None
    """The certificate to trust, over https."""

    def environment(self) -> dict[str, str]:
        """What an operator would set."""
        settings = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        return settings | ({"AWS_CA_BUNDLE": str(self.authority)} if self.authority else {})

    @functools.cache  # noqa: B019 - a few servers per session; a client takes a quarter of a second
    def client(self):
        """A plain boto3 client, to prepare and to look behind the store's back."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            verify=str(self.authority) if self.authority else None,
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A fresh root to store below, and the server behind it, if there is one."""

    root: str
    server: S3Server | None
    bucket: str = ""
    part_bytes: int = 5 * 1024 * 1024
    """S3's smallest part of an upload."""


def new_bucket(server: S3Server) -> Place:
    bucket = f"b-{uuid.uuid4().hex[:12]}"
    server.client().create_bucket(Bucket=bucket)
    return Place(root=f"s3://{bucket}/some where/runs", server=server, bucket=bucket)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """A throw-away authority and a certificate for this machine."""

    authority: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path) -> Certificates:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    paths = Certificates(authority=folder / "ca.pem", certificate=folder / "cert.pem", key=folder / "key.pem")
    authority.cert_pem.write_to_path(str(paths.authority))
    issued.private_key_pem.write_to_path(str(paths.key))
    paths.certificate.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
    return paths


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serve(
    kind: str, folder: Path, certificates: Certificates, *, extra: dict[str, str] | None = None
) -> Iterator[S3Server]:
    """One server of a kind in `KINDS`; `extra` is added to its environment."""
    name, _, scheme = kind.partition("-")
    port, secure = free_port(), scheme == "https"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | (extra or {})
    if name == "moto":
        command = [sys.executable, str(ATOMIC_MOTO), "-H", "127.0.0.1", "-p", str(port)]
        command += ["-s", "-c", str(certificates.certificate), "-k", str(certificates.key)] if secure else []
    else:
        command = [sys.executable, "-m", "ministack"]
        environment |= {
            "GATEWAY_PORT": str(port),
            "BIND_HOST": "127.0.0.1",
            "S3_PERSIST": "1",
            "S3_DATA_DIR": str(folder / "objects"),
            "TMPDIR": str(folder),
            "LOG_LEVEL": "ERROR",
        }
        if secure:
            environment |= {
                "USE_SSL": "1",
                "MINISTACK_SSL_CERT": str(certificates.certificate),
                "MINISTACK_SSL_KEY": str(certificates.key),
            }
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        _wait_for(port, process, folder / "server.log")
        yield S3Server(endpoint=f"{scheme}://127.0.0.1:{port}", authority=certificates.authority if secure else None)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"server did not start: {log.read_text()[-2000:]}")
