"""An HTTP proxy that injures what passes: a rule sees each request and says what goes wrong with it."""

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_XML = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>injected</Message></Error>'


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a rule decides on."""

    number: int
    """1 for the first request through the proxy."""
    method: str
    path: str
    """With the query."""
    headers: dict[str, str]
    """Lower-case names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong; the plain Fault() is none."""

    status: int | None = None
    """Answer with this status instead of asking the server."""
    code: str = "InternalError"
    """S3's word in the body of that answer."""
    body: str = ""
    """The whole body of that answer, where `code` is not enough."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of that answer, besides."""
    rewrite: Callable[[bytes], bytes] | None = None
    """What becomes of the body of the server's answer."""
    shorten_to_bytes: int | None = None
    """Answer with so many bytes of the body and a Content-Length that agrees."""
    cut_after_bytes: int | None = None
    """Close the connection after so many bytes of the body, though more were promised."""
    reset: bool = False
    """With `cut_after_bytes`, end by RST instead of FIN."""
    lose_answer: bool = False
    """Let the server act, then close without a word."""
    flip_byte: bool = False
    """Change the first byte of the body."""
    drop_header: str = ""
    """Hide this header of the request from the server (lower case); signed ones only from one that checks nothing."""
    trickle_seconds: float = 0.0
    """Wait so long before every kilobyte."""


NO_FAULT = Fault()
Rule = Callable[[Request], Fault]


@dataclass
class FaultyProxy:
    """The proxy's address, its rule, and what passed; the rule may be set anew at any time."""

    endpoint: str
    rule: Rule = lambda _: NO_FAULT
    seen: list[Request] = field(default_factory=list)

    def times(self, method: str, part: str = "") -> int:
        """How many requests of a method had `part` in their path."""
        return sum(request.method == method and part in request.path for request in self.seen)


@contextlib.contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """Listens on a free port and passes plain http on to `upstream`, keeping the Host that was signed."""
    lock = threading.Lock()

    class Handler(_Handler):
        def handle_one(self) -> None:
            with lock:
                request = Request(
                    number=len(proxy.seen) + 1,
                    method=self.command,
                    path=self.path,
                    headers={name.lower(): value for name, value in self.headers.items()},
                )
                proxy.seen.append(request)
                fault = proxy.rule(request)
            self.pass_on(upstream, fault)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = FaultyProxy(endpoint=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one(self) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str):
        if name.startswith("do_"):
            return self.handle_one
        raise AttributeError(name)

    def log_message(self, *_) -> None:
        """Silence."""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that gave up
            super().handle()

    def handle_expect_100(self) -> bool:
        self.send_response_only(100)
        self.end_headers()
        return True

    def pass_on(self, upstream: str, fault: Fault) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault.status is not None:
            headers = {"Content-Type": "application/xml", **fault.headers}
            self.answer(fault.status, headers, (fault.body or _XML.format(fault.code)).encode())
            return
        connection = http.client.HTTPConnection(urlsplit(upstream).netloc, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"connection", "expect", fault.drop_header}:
                    connection.putheader(name, value)
            connection.endheaders(body)
            reply = connection.getresponse()
            content = reply.read() if fault.rewrite is None else fault.rewrite(reply.read())
            headers = {k: v for k, v in reply.getheaders() if k.lower() not in {"connection", "transfer-encoding"}}
        finally:
            connection.close()
        if fault.lose_answer:
            self.close_connection = True
            return
        self.answer(reply.status, headers, content[: fault.shorten_to_bytes], fault)

    def answer(self, status: int, headers: dict[str, str], content: bytes, fault: Fault = NO_FAULT) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command == "HEAD":
            self.end_headers()
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault.flip_byte and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        whole, content = len(content), content[: fault.cut_after_bytes]
        step = 1024 if fault.trickle_seconds else max(1, len(content))
        for at in range(0, len(content), step):
            time.sleep(fault.trickle_seconds)
            self.wfile.write(content[at : at + step])
        if len(content) < whole:
            self.close_connection = True
            if fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
