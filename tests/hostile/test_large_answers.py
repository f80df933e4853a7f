"""A store that answers with gigabytes where kilobytes are meant: its status still counts, and no more is read."""

import contextlib
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

ASK = """
import sys
from job.core.errors import JobError
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.edge.store.patience import Patience
patience = Patience(attempts=2, first_pause_seconds=0.01)
store = open_store("s3://bucket/prefix", StoreSettings(), patience=patience)
limit()
ask = {"read": lambda: store.read("key"), "list": lambda: list(store.list()), "write": lambda: store.write("key", b"")}
try:
    ask[sys.argv[1]]()
except JobError as error:
    print(error.code, error)
"""


@pytest.fixture
def flood(monkeypatch):
    """An endpoint that answers every request with 4 GiB, under the status that is set."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(server.status)
            self.send_header("Content-Length", "1000")
            self.send_header("ETag", '"e"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()

        def answer(self):
            self.send_response(server.status)
            if server.packed:
                packed = zlib.compressobj(wbits=31)
                self.send_header("Content-Encoding", "gzip")
                self.end_headers()
                with contextlib.suppress(OSError):
                    for _ in range(4096):
                        self.wfile.write(packed.compress(b"x" * 2**20))
                return
            self.send_header("Content-Length", str(2**32))
            self.send_header("Content-Type", "application/xml")
            self.send_header("ETag", '"e"')
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(b"<Error><Code>AccessDenied</Code><Message>")
                for _ in range(4096):
                    self.wfile.write(b"x" * 2**20)

        do_GET = do_PUT = answer  # noqa: N815 - as http.server looks for them

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.packed = True, False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    names = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_REGION": "us-east-1"}
    for name, value in (names | {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}).items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


ASK_HUB = """
import huggingface_hub, sys
from job.core.errors import JobError
from job.edge.base.hub import HubRepo
from job.edge.store.patience import Patience
patience = Patience(attempts=2, first_pause_seconds=0.01)
repo = HubRepo(repo_id="some/model", revision="0" * 40, should_stop=lambda: False, patience=patience)
huggingface_hub.HfApi, huggingface_hub.get_session()
limit()
try:
    repo.files()
except JobError as error:
    print(error.code, error)
"""


@pytest.mark.parametrize(("status", "code"), [(403, 77), (404, 66), (400, 69), (503, 69)])
def test_a_hub_that_refuses_with_gigabytes_is_understood_by_its_status(flood, limited, monkeypatch, status, code):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{flood.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    flood.status = status
    told = limited(ASK_HUB, mib=256).splitlines()[-1]  # before it a warning of each try
    assert told.startswith(f"{code} some/model at 000000000000"), told
    assert str(status) in told


@pytest.mark.parametrize(
    ("status", "ask", "code", "words"),
    [
        (403, "read", 77, "403"),
        (403, "list", 77, "403"),
        (403, "write", 77, "403"),
        (404, "read", 66, "404"),
        (503, "read", 69, "failed 2 times"),
        (200, "list", 69, "an answer of more than 33,554,432 bytes"),
        (200, "read", 65, "larger than the 16,777,216 bytes"),
    ],
)
def test_an_answer_of_gigabytes_is_read_no_further_than_it_counts(flood, limited, status, ask, code, words):
    flood.status = status
    told = limited(ASK, ask, mib=256)
    assert told.startswith(f"{code} s3://bucket/prefix"), told
    assert words in told


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_of_the_hub_that_does_not_end_is_read_no_further(flood, limited, monkeypatch, packed):
    """Also where it is small on its way."""
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{flood.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    flood.status, flood.packed = 200, packed
    told = limited(ASK_HUB, mib=256).splitlines()[-1]
    assert told.startswith("69 some/model at 000000000000: its list of files could not be read"), told


FETCH_HUB = """
import huggingface_hub, sys
from pathlib import Path
from job.core.errors import JobError
from job.edge.base.hub import HubRepo
from job.edge.store.patience import Patience
patience = Patience(attempts=1, first_pause_seconds=0.01)
repo = HubRepo(repo_id="some/model", revision="0" * 40, should_stop=lambda: False, patience=patience)
try:
    limit()
    repo.bring({"config.json": 1000}, cache=Path(sys.argv[1]), on_bytes=lambda _: None)
except JobError as error:
    print(error.code, error)
"""


def test_a_file_of_the_hub_that_does_not_end_fills_no_disk(flood, limited, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{flood.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    flood.status = 200
    told = limited(FETCH_HUB, tmp_path, mib=2048).splitlines()[-1]
    assert told.startswith("69 some/model at 000000000000: config.json could not be read"), told
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 2**26


ROLES = {
    "a container's": {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:{port}/role"},
    "a node's": {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:{port}/"},
    "STS's": {
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/x",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "{token}",
        "AWS_ENDPOINT_URL_STS": "http://127.0.0.1:{port}",
    },
}
ASK_ROLE = """
from job.core.errors import JobError
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.edge.store.patience import Patience
import boto3
for service in ("sts", "s3"):
    boto3.session.Session().client(service, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")
limit()
try:
    open_store("s3://bucket/x", StoreSettings(), patience=Patience(attempts=1, first_pause_seconds=0.01)).read("key")
except JobError as error:
    print(error.code, error)
"""


@pytest.mark.parametrize("status", [200, 403, 500])
@pytest.mark.parametrize("kind", ROLES)
def test_a_source_of_credentials_that_answers_with_gigabytes_is_read_no_further(
    flood, limited, monkeypatch, tmp_path, kind, status
):
    (tmp_path / "token").write_text("token")
    flood.status = status
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    for name, value in ROLES[kind].items():
        monkeypatch.setenv(name, value.format(port=flood.server_port, token=tmp_path / "token"))
    monkeypatch.setenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "1")
    told = limited(ASK_ROLE, mib=256)
    assert told.partition(" ")[0] in {"64", "69", "77"}, told
    assert len(told.splitlines()) == 1
    assert len(told) < 1000
