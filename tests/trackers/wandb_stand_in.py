"""A small stand-in for W&B's server: as much of its API as the client speaks to begin, resume and end a run."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class TrackedRun:
    """One run as the server has it."""

    name: str
    begun: int = 0
    """How many attempts have begun or resumed it."""
    lines: list[dict] = field(default_factory=list)
    """Its history."""
    files: dict[str, bytes] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def summary(self) -> dict:
        return json.loads(self.files["wandb-summary.json"])


class WandbStandIn(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, TrackedRun] = {}
        self.goes_deaf_with_history = False
        """Takes what comes with the first numbers, and answers nothing from then on."""
        self.is_deaf = False
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that is killed is part of these tests."""


class _Handler(BaseHTTPRequestHandler):
    server: WandbStandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        found = self._found(body)
        if self.server.is_deaf:
            self.server.over.wait(600)
            self.close_connection = True
            return
        answer = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _found(self, body: bytes) -> object:
        if self.path == "/graphql":
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            return {"data": self._graphql(name[1] if name else "", asked.get("variables") or {})}
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self._take(self.server.runs[match[1]], json.loads(body))
        elif match := re.fullmatch(r"/upload/([^/]+)/(.+)", self.path):
            self.server.runs[match[1]].files[match[2]] = body
        return {}

    def _take(self, run: TrackedRun, sent: dict) -> None:
        history = (sent.get("files") or {}).get("wandb-history.jsonl")
        if history is not None:
            # What is sent again takes the place of what it was.
            run.lines[history["offset"] :] = [json.loads(line) for line in history["content"]]
            self.server.is_deaf |= self.server.goes_deaf_with_history
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])

    def _graphql(self, name: str, given: dict) -> dict:
        entity = {"id": "RW50", "name": "someone"}
        project = {"id": "UHJv", "name": given.get("project") or "notes", "entity": entity}
        if name == "RunResumeStatus":
            run = self.server.runs.get(given["name"])
            return {"model": {**project, "bucket": None if run is None else _resumed(run)}}
        if name == "UpsertBucket":
            run = self.server.runs.setdefault(given["name"], TrackedRun(name=given.get("displayName") or ""))
            run.begun += given.get("displayName") is not None
            bucket = {"id": "QnVja2V0", "name": given["name"], "displayName": run.name, "project": project}
            bucket |= {"description": None, "config": "{}", "sweepName": None, "historyLineCount": len(run.lines)}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            place = f"{self.server.url}/upload/{given['run']}"
            files = [{"name": each, "uploadUrl": f"{place}/{each}"} for each in given["files"]]
            return {"createRunFiles": {"runID": "QnVja2V0", "uploadHeaders": [], "files": files}}
        return {}


def _resumed(run: TrackedRun) -> dict:
    """The run as an attempt that resumes it finds it."""
    tail = [json.dumps(line) for line in run.lines[-1:]]
    return {
        "id": "QnVja2V0",
        "name": run.name,
        "displayName": run.name,
        "summaryMetrics": "{}",
        "logLineCount": 0,
        "historyLineCount": len(run.lines),
        "eventsLineCount": 0,
        "historyTail": json.dumps(tail),
        "eventsTail": json.dumps([]),
        "config": "{}",
        "tags": [],
        "notes": None,
        "wandbConfig": json.dumps({"t": 1}),
    }


@contextmanager
def wandb_stand_in() -> Iterator[WandbStandIn]:
    """A server without runs."""
    with WandbStandIn() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
