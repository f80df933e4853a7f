"""The notice of an attempt's end: three tries, bounded in time, only where it is safe, and no secret in any message."""

import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import structlog
import trustme

from job.core.errors import UsageError
from job.edge.host import notice as module
from job.edge.host.notice import Notice

TOKEN = "T0K3N-0f-the-path"
PATIENCE_SECONDS = 60.0


class Receiver:
    """Answers with these codes, one after another, the last one for ever; and what it got."""

    def __init__(self, codes, location=None, certificate=None) -> None:
        self.got, self.paths = [], []
        left = [*codes]
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                receiver.paths.append(self.path)
                receiver.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                receiver.headers = dict(self.headers)
                self.send_response(left.pop(0) if len(left) > 1 else left[0])
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self):  # what a redirection would come as
                self.do_POST()

            def log_message(self, *_):
                """Silence."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificate is not None:
            import ssl

            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port


@contextlib.contextmanager
def receiving(*codes, **how):
    receiver = Receiver(codes, **how)
    thread = threading.Thread(target=receiver.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        receiver.server.server_close()
        thread.join()


@pytest.fixture
def said():
    structlog.reset_defaults()  # a command that was called before may have left warnings only
    with structlog.testing.capture_logs() as events:
        yield events
    assert TOKEN not in str(events)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.01)


def send(port, *, scheme="http", host="127.0.0.1", seconds=PATIENCE_SECONDS, content=None):
    Notice(f"{scheme}://{host}:{port}/hooks/{TOKEN}").send(content or {"code": 65}, seconds=seconds)


def test_it_is_one_post_of_json(said):
    with receiving(200) as receiver:
        send(receiver.port, content={"code": 65, "reason": "für \udcff"})

    assert receiver.got == [{"code": 65, "reason": "für ?"}]
    assert receiver.paths == [f"/hooks/{TOKEN}"]
    assert receiver.headers["Content-Type"] == "application/json"
    assert [event["event"] for event in said] == ["notified"]


@pytest.mark.parametrize(
    ("codes", "tries", "event"),
    [
        ((500, 503, 204), 3, "notified"),
        ((429, 200), 2, "notified"),
        ((500,), 3, "not_notified"),
        ((404,), 1, "not_notified"),
        ((401,), 1, "not_notified"),
    ],
)
def test_what_may_pass_is_tried_three_times_and_a_refusal_once(said, codes, tries, event):
    with receiving(*codes) as receiver:
        send(receiver.port)

    assert len(receiver.got) == tries
    assert [each["event"] for each in said] == [event]


def test_it_goes_nowhere_where_an_answer_points(said):
    with receiving(200) as other, receiving(307, location=f"http://127.0.0.1:{other.port}/") as receiver:
        send(receiver.port)

    assert (len(receiver.got), other.got) == (1, [])
    assert said[0]["reason"] == "it answered 307"


def test_nobody_there_is_no_failure(said):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    send(port)

    assert said[0]["event"] == "not_notified"
    assert "Connection refused" in said[0]["reason"]


def test_who_is_silent_is_not_waited_for_beyond_the_time(said):
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listener:
        began = time.monotonic()
        send(listener.getsockname()[1], seconds=0.5)

    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    assert said[0]["event"] == "not_notified"


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/x",
        "http://10.0.0.1/x",
        "http://localhost.example.com/x",
        "http://localhost\\@example.com/x",
        "http://127.0.0.1@example.com/x",
        "https://name:secret@example.com/x",
        "https://secret@example.com/x",
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "https:///x",
        "example.com/x",
        "",
        "https://example.com/a b",
        "https://example.com/a\nb",
        "https://example.com:port/",
        "https://[::1/",
    ],
)
def test_other_urls_are_refused_without_being_repeated(url):
    with pytest.raises(UsageError) as refused:
        Notice(url)

    assert "secret" not in str(refused.value)
    assert "/x" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["https://example.com/x", "http://localhost:8/x", "http://[::1]/x", "http://127.9.9.9/"]
)
def test_https_and_this_machine_are_taken(url):
    Notice(url)


def test_a_proxy_is_not_asked_for_what_is_on_this_machine(said, monkeypatch):
    with receiving(200) as proxy, receiving(200) as receiver:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        send(receiver.port)

    assert (len(receiver.got), proxy.got) == (1, [])


def test_a_certificate_is_looked_at(said, tmp_path, monkeypatch):
    authority = trustme.CA()
    with receiving(200, certificate=authority.issue_cert("localhost")) as receiver:
        send(receiver.port, scheme="https", host="localhost")
        assert receiver.got == []
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        send(receiver.port, scheme="https", host="localhost")

    assert len(receiver.got) == 1
    assert [event["event"] for event in said] == ["not_notified", "notified"]
