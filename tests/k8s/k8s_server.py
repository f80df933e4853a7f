"""As much of an API server as kubectl asks before it does nothing: what there is, and a few objects to read."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from k8s_manifests import Document

KINDS = {
    "v1": ["Pod", "ConfigMap", "Secret", "ServiceAccount", "Node", "Event", "PersistentVolumeClaim", "Service"],
    "batch/v1": ["Job", "CronJob"],
    "networking.k8s.io/v1": ["NetworkPolicy"],
    "jobset.x-k8s.io/v1alpha2": ["JobSet"],
}
LOG = '{"event": "step"}\n'


class ApiServer(ThreadingHTTPServer):
    """Reads only: nothing that is asked of it changes an object."""

    def __init__(self, objects: list[Document]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.answers = dict(_discovery())
        self.objects = {_plural(kind): [] for kinds in KINDS.values() for kind in kinds}
        for each in objects:
            self.objects[_plural(each["kind"])].append(each)
        self.asked: list[str] = []
        """Every path, in order."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def api_server(objects: list[Document]) -> Iterator[ApiServer]:
    with ApiServer(objects) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _plural(kind: str) -> str:
    return kind.lower().removesuffix("y") + ("ies" if kind.endswith("y") else "s")


def _discovery() -> Iterator[tuple[str, Document]]:
    yield "/api", {"kind": "APIVersions", "versions": ["v1"]}
    groups = []
    for version, kinds in KINDS.items():
        resources = [
            {"name": _plural(kind), "kind": kind, "namespaced": kind != "Node", "verbs": ["get", "list", "patch"]}
            for kind in kinds
        ]
        found = {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        yield f"/{'apis' if '/' in version else 'api'}/{version}", found
        if "/" in version:
            told = {"groupVersion": version, "version": version.split("/")[1]}
            groups.append({"name": version.split("/")[0], "versions": [told], "preferredVersion": told})
    yield "/apis", {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


class _Answers(BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        self.server.asked.append(path)
        if path.endswith("/log"):
            self._send(200, LOG.encode(), "text/plain")
            return
        found = self.server.answers.get(path) or self._object(path, query)
        self._send(200 if found else 404, json.dumps(found or _not_found(path)).encode(), "application/json")

    do_POST = do_GET  # noqa: N815 - and so

    def _object(self, path: str, query: dict[str, list[str]]) -> Document | None:
        *_, kind, name = ["", *path.split("/")]
        if kind in self.server.objects:
            return next((each for each in self.server.objects[kind] if each["metadata"]["name"] == name), None)
        if name not in self.server.objects:
            return None
        wanted = dict(each.split("=") for each in query.get("labelSelector", [""])[0].split(",") if each)
        here = [each for each in self.server.objects[name] if wanted.items() <= each["metadata"]["labels"].items()]
        (whole,) = [(kind, v) for v, kinds in KINDS.items() for kind in kinds if _plural(kind) == name]
        return {"kind": f"{whole[0]}List", "apiVersion": whole[1], "metadata": {}, "items": here}

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_words: object) -> None:
        """Says nothing."""


def _not_found(path: str) -> Document:
    told = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
    return told | {"message": f"{path}: not there"}
