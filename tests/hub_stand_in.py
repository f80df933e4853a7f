"""A small stand-in for the model hub: as much of its API as huggingface_hub speaks to push, by plain HTTP (LFS)."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_aTokenThatCanWriteAndIsNeverShown12345"
_LARGE = (".safetensors",)


@dataclass
class Repository:
    """A model repository and its commits, the newest last."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


class HubStandIn(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.account = {
            "name": "someone",
            "orgs": [{"name": "lab"}],
            "auth": {"type": "access_token", "accessToken": {"role": "write"}},
        }
        self.refuse: Callable[[str], int | None] = lambda _asked: None
        """Gets `METHOD /path`: the status that is answered instead; 0: nothing is answered."""
        self.asked: Counter[str] = Counter()
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self) -> dict[str, str]:
        """What an operator would set. It has no Xet: the job pushes without."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}

    def handle_error(self, *_: object) -> None:
        """A client that stops in the middle is part of these tests."""


class _Handler(BaseHTTPRequestHandler):
    server: HubStandIn

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
        path = self.path.split("?")[0]
        self.server.asked[f"{self.command} {path}"] += 1
        status = self.server.refuse(f"{self.command} {path}")
        if status == 0:
            self.server.over.wait(60)
            self.close_connection = True
            return
        is_upload = path.startswith("/blobs/")  # signed by its address, as a bucket's
        if status is None and not is_upload and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            self._reply({"error": "not this time"}, status=status)
            return
        if self.command == "PUT":
            self._take_blob(path.removeprefix("/blobs/"), body)
            return
        self._reply(*self._found(path, body))

    def _found(self, path: str, body: bytes) -> tuple[object, int]:
        if path == "/api/whoami-v2":
            return self.server.account, 200
        if path == "/api/validate-yaml":
            return self._judge_card(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if re.fullmatch(r"/[\w.-]+/[\w.-]+\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        return self._of_repository(path, body)

    def _of_repository(self, path: str, body: bytes) -> tuple[object, int]:
        match = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/main)?", path)
        repository = self.server.repositories.get(match[1]) if match else None
        if repository is None:
            return {"error": "Repository not found"}, 404
        if match[2] == "preupload":
            return {"files": [self._mode(repository, each["path"]) for each in json.loads(body)["files"]]}, 200
        if match[2] == "commit":
            return self._commit(match[1], repository, body)
        return {"id": match[1], "sha": repository.sha, "private": repository.private, "siblings": []}, 200

    def _judge_card(self, text: str) -> tuple[object, int]:
        """The hub refuses a base that is no model of it, and a licence that it does not know."""
        front = yaml.safe_load(text.split("---\n")[1])
        base = front.get("base_model", "a/b")
        wrong = [] if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else [f'"base_model" with value "{base}" is not valid']
        return {"errors": [{"message": each} for each in wrong], "warnings": []}, 400 if wrong else 200

    def _create(self, asked: dict) -> tuple[object, int]:
        name = f"{asked['organization']}/{asked['name']}"
        found = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            return found, 409
        self.server.repositories[name] = Repository(private=asked.get("visibility") == "private")
        return found, 200

    def _mode(self, repository: Repository, path: str) -> dict:
        is_large = path.endswith(_LARGE)
        held = repository.files.get(path)
        oid = None
        if held is not None:
            git = hashlib.sha1(b"blob %d\0" % len(held) + held)
            oid = hashlib.sha256(held).hexdigest() if is_large else git.hexdigest()
        return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": oid}

    def _batch(self, asked: dict) -> tuple[object, int]:
        objects = []
        for each in asked["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/blobs/{each['oid']}", "header": {}}}
            is_here = each["oid"] in self.server.blobs
            objects.append({**each, "authenticated": True} | ({} if is_here else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}, 200

    def _take_blob(self, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self._reply({})

    def _commit(self, name: str, repository: Repository, body: bytes) -> tuple[object, int]:
        head, *changes = [json.loads(line) for line in body.splitlines()]
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                repository.files[value["path"]] = self.server.blobs[value["oid"]]
        repository.commits.append(head["value"]["summary"])
        return {"commitUrl": f"{self.server.url}/{name}/commit/{repository.sha}", "commitOid": repository.sha}, 200

    def _reply(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """A hub without models."""
    with HubStandIn() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.over.set()
            hub.shutdown()
            thread.join()
