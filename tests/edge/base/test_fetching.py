"""The base model's ways in: a hub that answers, refuses or fails, a local folder, a store."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from warm_image import WarmImage

from job.core.errors import DataError, NotFoundError, StopRequestedError, UsageError
from job.edge.base.fetching import BaseModel, fetch, identify, read_headers
from job.edge.store.objects import StoreSettings

ROOT = Path(__file__).parents[3]
REPO = "someone/tiny-llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisTokenMustNeverBeShown1234567890"


def safetensors(*tensor_bytes: int, first: int = 0) -> bytes:
    header, at = {}, 0
    for number, size in enumerate(tensor_bytes, start=first):
        header[f"t{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\1" * at


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"w{number}": shard for number, shard in enumerate(shards)}}).encode()


SMALL: dict[str, bytes] = {
    "config.json": json.dumps({"model_type": "llama"}).encode(),
    "tokenizer.json": b"{}",
    "README.md": b"---\nlicense: apache-2.0\n---\n# Tiny\n",
}
MODEL = {**SMALL, "model.safetensors": safetensors(100, 20)}
NOISE = {
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"import os",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"other",
    "consolidated.safetensors": b"the same again",
}


class Hub(ThreadingHTTPServer):
    """Speaks as much of the hub's API as a download needs, and keeps a list of what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = {**MODEL, **NOISE}
        self.refuse: Callable[[str], tuple[int, dict[str, str]] | None] = lambda _path: None
        self.asked: Counter[str] = Counter()
        self.knows_parts = True
        self.sent = 0
        """Bytes of answers to requests for a part."""
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that stops in the middle is part of these tests."""


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if REPO in path:  # newer libraries ask the hub about other things too
            self.server.asked[f"{self.command} {path}"] += 1
            self.server.tokens.add(self.headers.get("Authorization"))
        refusal = self.server.refuse(path)
        if refusal is not None:
            self.reply(refusal[0], refusal[1], b"", body=body)
        elif path == f"/api/models/{REPO}/revision/{COMMIT}":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.server.files.items()]
            content = json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode()
            self.reply(200, {"Content-Type": "application/json"}, content, body=body)
        else:
            self.send(path.removeprefix(f"/{REPO}/resolve/{COMMIT}/"), body=body)

    def send(self, name: str, *, body: bool) -> None:
        content = self.server.files.get(name)
        if content is None:
            self.reply(404, {"X-Error-Code": "EntryNotFound"}, b"", body=body)
            return
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if (asked := self.headers.get("Range")) and self.server.knows_parts:
            start, end = asked.removeprefix("bytes=").split("-")
            part = content[int(start) : int(end) + 1 if end else None]
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
            self.server.sent += len(part)
            self.reply(206, headers, part, body=body)
        else:
            self.reply(200, headers, content, body=body)

    def reply(self, status: int, headers: dict[str, str], content: bytes, *, body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# The library reads its environment when it is imported, so each fetch has a process of its own that imports it anew.
FETCH = """
import json, os, resource, sys
from pathlib import Path
from job.core.errors import JobError
from job.edge.base.fetching import fetch, identify, read_headers
from job.edge.store.patience import Patience
from job.edge.host.logs import configure
from job.edge.store.objects import StoreSettings

folder, budget, stop_after = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
seen = [0]
if "LARGEST_FILE_BYTES" in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LARGEST_FILE_BYTES"]),) * 2)
configure(secrets=[])
try:
    if sys.argv[6:] == ["headers"]:
        found = read_headers(
            identify(sys.argv[4], sys.argv[5], settings=StoreSettings()),
            models_folder=folder,
            settings=StoreSettings(),
            should_stop=lambda: False,
            patience=Patience(attempts=100, budget_seconds=budget, first_pause_seconds=0.05),
        )
        print(json.dumps({"code": 0, "tensors": {name: header.shape for name, header in found.items()}}))
        sys.exit()
    model = fetch(
        identify(sys.argv[4], sys.argv[5], settings=StoreSettings()),
        models_folder=folder,
        settings=StoreSettings(),
        should_stop=lambda: 0 < stop_after <= seen[0],
        on_progress=lambda done, total: seen.__setitem__(0, done),
        patience=Patience(attempts=100, budget_seconds=budget, first_pause_seconds=0.05),
        weights=sys.argv[6:] != ["small"],
    )
    print(json.dumps({"code": 0, "folder": str(model.folder), "licence": model.licence, "bytes": model.bytes}))
except JobError as error:
    print(json.dumps({"code": error.code, "message": str(error)}))
"""


class Fetcher:
    """Fetches REPO at COMMIT in a fresh process, as a job on a fresh node would: a fork of the warm image, or cold."""

    def __init__(self, hub: Hub, folder: Path, image: WarmImage) -> None:
        self.hub, self.folder, self.image = hub, folder, image
        self.models = folder / "models"

    def __call__(
        self,
        *more: str,
        budget: float = 30,
        stop_after: int = 0,
        env: dict[str, str] | None = None,
        cold: bool = False,
    ) -> dict[str, Any]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / "hf"),
            "HF_TOKEN": TOKEN,
            **(env or {}),
        }
        code, said, errors = self._run(
            [str(self.models), str(budget), str(stop_after), REPO, COMMIT, *more], environment, cold=cold
        )
        assert TOKEN not in said + errors
        assert code == 0, errors
        return json.loads(said.splitlines()[-1]) | {"output": said + errors}

    def _run(self, arguments: list[str], environment: dict[str, str], *, cold: bool) -> tuple[int, str, str]:
        paths = self.folder / "fetch.out", self.folder / "fetch.err"
        with paths[0].open("wb") as out, paths[1].open("wb") as err:
            files = {"cwd": self.folder, "stdout": out, "stderr": err}
            if cold:
                child = subprocess.Popen([sys.executable, "-c", FETCH, *arguments], env=environment, **files)
            else:
                own = {"code": FETCH, "forget": ("huggingface_hub",)}
                child = self.image.begin(arguments, environment=environment, **own, **files)
            code = child.wait(120)
        return code, *(path.read_text() for path in paths)


@pytest.fixture
def fetcher(hub: Hub, tmp_path: Path, warm: WarmImage) -> Fetcher:
    return Fetcher(hub, tmp_path, warm)


def test_a_hub_model_arrives_with_all_it_needs_and_nothing_that_could_run(hub, fetcher):
    result = fetcher(cold=True)

    assert result["code"] == 0
    assert {path.name for path in Path(result["folder"]).iterdir()} == set(MODEL)
    assert {name: (Path(result["folder"]) / name).read_bytes() for name in MODEL} == MODEL
    assert (result["licence"], result["bytes"]) == ("apache-2.0", sum(map(len, MODEL.values())))
    assert Path(result["folder"]).is_relative_to(fetcher.models)
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert "%|" not in result["output"]  # no progress bar


def test_a_second_fetch_and_one_without_network_use_what_is_there(hub, fetcher):
    first = fetcher()
    asked = hub.asked.total()

    assert fetcher()["folder"] == first["folder"]
    assert fetcher(env={"HF_HUB_OFFLINE": "1"})["folder"] == first["folder"]
    assert hub.asked.total() == asked


def test_a_model_in_the_librarys_own_cache_is_used_where_it_stands(hub, fetcher):
    first = fetcher()
    shutil.move(fetcher.models / "hub", fetcher.folder / "hf" / "hub")

    result = fetcher(env={"HF_HUB_OFFLINE": "1"})

    assert result["folder"] == first["folder"].replace(str(fetcher.models), str(fetcher.folder / "hf"))


def test_offline_and_not_fetched_says_how_to_fetch_beforehand(hub, fetcher):
    result = fetcher(env={"HF_HUB_OFFLINE": "1"})

    assert result["code"] == 66
    assert "HF_HUB_OFFLINE" in result["message"]
    assert "entrypoint.py fetch" in result["message"]
    assert not hub.asked


LARGE = {
    "a.safetensors": safetensors(3_000_000),
    "b.safetensors": safetensors(*[1] * 5000, first=1),  # its header is larger than what is read at first
    "c.safetensors": safetensors(2_000_000, first=5001),
}
LARGE_SHAPES = {"t0": [3_000_000], **{f"t{number}": [1] for number in range(1, 5001)}, "t5001": [2_000_000]}


@pytest.mark.parametrize("busy", [False, True], ids=["", "busy"])
def test_the_headers_of_a_hub_model_are_read_without_its_weights(hub, fetcher, busy):
    hub.files = SMALL | LARGE | {"model.safetensors.index.json": index(*LARGE)}
    refusals = {f"/{REPO}/resolve/{COMMIT}/{name}": 2 * busy for name in LARGE}

    def refuse(path):
        if not refusals.get(path):
            return None
        refusals[path] -= 1
        return 429, {"Retry-After": "0"}

    hub.refuse = refuse
    result = fetcher("headers")

    assert result["tensors"] == LARGE_SHAPES
    assert hub.sent < 1_500_000 < sum(map(len, LARGE.values()))
    assert not list(fetcher.models.rglob("*.safetensors"))
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_the_headers_of_a_hub_that_sends_all_of_a_file_are_read_all_the_same(hub, fetcher, monkeypatch):
    hub.files = SMALL | LARGE | {"model.safetensors.index.json": index(*LARGE)}
    hub.knows_parts = False

    assert fetcher("headers")["tensors"] == LARGE_SHAPES


def test_a_header_that_is_none_is_refused_before_the_weights_move(hub, fetcher):
    hub.files["model.safetensors"] = b"\xff" * 2_000_000

    result = fetcher("headers")
    assert (result["code"], hub.sent) == (65, 2 * 2**17)  # a second reading says the same
    assert "model.safetensors: no safetensors header; copy the model again" in result["message"]


def test_the_headers_of_a_gated_model_are_denied_as_its_files_are(hub, fetcher):
    hub.refuse = lambda path: (403, {"X-Error-Code": "GatedRepo"}) if path.endswith(".safetensors") else None

    result = fetcher("headers")
    assert result["code"] == 77
    assert "accept its licence" in result["message"]


def test_the_small_files_alone_come_without_the_weights(hub, fetcher):
    result = fetcher("small")

    assert {path.name for path in Path(result["folder"]).iterdir()} == set(SMALL)
    assert fetcher()["bytes"] == sum(map(len, MODEL.values()))


def test_a_model_that_cannot_be_trained_is_refused_by_its_small_files(hub, fetcher):
    hub.files = {**SMALL, "pytorch_model.bin": b"x"}

    result = fetcher("small")

    assert result["code"] == 64
    assert "pickle" in result["message"]


@pytest.mark.parametrize(
    ("where", "status", "headers", "code", "words"),
    [
        ("/api/", 401, {}, 77, ["HF_TOKEN", "401"]),
        ("/api/", 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, 77, ["Invalid credentials"]),
        ("/config.json", 403, {"X-Error-Code": "GatedRepo"}, 77, ["licence", "{url}/someone/tiny-llama", "HF_TOKEN"]),
        ("/config.json", 401, {"X-Error-Code": "GatedRepo"}, 77, ["licence", "{url}/someone/tiny-llama"]),
        ("/config.json", 403, {}, 77, ["HTTP 403"]),
        ("/api/", 401, {"X-Error-Code": "RepoNotFound"}, 66, ["no such repository", "HF_TOKEN"]),
        ("/api/", 404, {"X-Error-Code": "RepoNotFound"}, 66, ["no such repository", REPO]),
        ("/api/", 404, {"X-Error-Code": "RevisionNotFound"}, 66, ["model.revision"]),
        ("/api/", 404, {}, 66, ["model.base"]),
        ("/config.json", 404, {"X-Error-Code": "EntryNotFound"}, 66, ["config.json"]),
        ("/api/", 418, {}, 69, ["HTTP 418", "HF_ENDPOINT"]),
    ],
)
def test_a_refusal_says_what_it_is_and_is_not_tried_again(hub, fetcher, where, status, headers, code, words):
    hub.refuse = lambda path: (status, headers) if where in path else None

    result = fetcher()

    assert result["code"] == code, result
    for word in words:
        assert word.format(url=hub.url) in result["message"]
    assert max(hub.asked.values()) == 1


def test_a_hub_that_is_busy_for_a_moment_is_waited_for(hub, fetcher):
    left = {"/api/models": 2, "/config.json": 1, "/model.safetensors": 2}

    def busy(path: str) -> tuple[int, dict[str, str]] | None:
        for part, times in left.items():
            if part in path and times > 0:
                left[part] = times - 1
                return (429, {"Retry-After": "0"}) if part == "/api/models" else (503, {})
        return None

    hub.refuse = busy

    result = fetcher()

    assert result["code"] == 0, result
    assert set(left.values()) == {0}
    assert result["output"].count("hub_retry") == 5, result["output"]


@pytest.mark.parametrize("where", ["/api/", "/model.safetensors"])
def test_a_hub_that_stays_down_ends_as_unavailable_within_the_budget(hub, fetcher, where):
    hub.refuse = lambda path: (503, {}) if where in path else None

    result = fetcher(budget=0.5)

    assert result["code"] == 69
    assert "HTTP 503" in result["message"]
    assert not list(fetcher.models.rglob("model.safetensors"))


def test_a_wait_longer_than_the_budget_is_not_waited_for(hub, fetcher):
    hub.refuse = lambda path: (429, {"Retry-After": "3600"}) if "/config.json" in path else None

    assert fetcher(budget=10)["code"] == 69
    assert hub.asked[f"HEAD /{REPO}/resolve/{COMMIT}/config.json"] == 1


def test_a_hub_that_nobody_answers_for_ends_as_unavailable(fetcher):
    assert fetcher(budget=0.5, env={"HF_ENDPOINT": "http://127.0.0.1:9"})["code"] == 69


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        ({**SMALL, "pytorch_model.bin": b"x"}, 64, ["pickle", "safetensors"]),
        ({**SMALL}, 66, ["model.safetensors"]),
        ({"model.safetensors": b"x"}, 66, ["config.json"]),
        (MODEL | {"config.json": b'{"model_type": "mystery", "auto_map": {}}'}, 64, ["mystery", "never runs"]),
        (MODEL | {"config.json": b'{"model_type": "mystery"}'}, 64, ["unknown to the installed transformers"]),
        (MODEL | {"config.json": b"{"}, 65, ["config.json is not JSON"]),
        (
            SMALL | {"model.safetensors.index.json": index("a.safetensors", "b.safetensors"), "a.safetensors": b"x"},
            66,
            ["b.safetensors"],
        ),
        (SMALL | {"model.safetensors.index.json": index("../../a.safetensors")}, 65, ["weight_map"]),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_weights_move(hub, fetcher, files, code, words):
    hub.files = files

    result = fetcher()

    assert result["code"] == code, result
    for word in words:
        assert word in result["message"]
    assert not [
        asked
        for asked in hub.asked
        if asked.startswith("GET")
        and "safetensors" in asked.replace(".index", "")
        and not asked.endswith(".index.json")
    ]


def test_a_stop_in_the_middle_of_a_file_leaves_no_half_model_and_the_next_fetch_goes_on(hub, fetcher):
    hub.files = SMALL | {"model.safetensors": safetensors(25_000_000)}  # more than the library's largest read

    stopped = fetcher(stop_after=1)

    assert stopped["code"] == 75, stopped
    assert not list(fetcher.models.rglob("model.safetensors"))
    assert fetcher(env={"HF_HUB_OFFLINE": "1"})["code"] == 66

    resumed = fetcher()

    assert resumed["code"] == 0
    assert (Path(resumed["folder"]) / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert hub.asked[f"GET /{REPO}/resolve/{COMMIT}/tokenizer.json"] == 1  # what was complete was kept


def test_a_file_cut_short_in_the_cache_is_noticed(hub, fetcher):
    folder = Path(fetcher()["folder"])
    (folder / "model.safetensors").resolve().write_bytes(MODEL["model.safetensors"][:-1])

    result = fetcher()

    assert result["code"] == 65
    assert "model.safetensors" in result["message"]


def test_a_models_folder_that_cannot_be_written_is_the_local_disks_fault(fetcher):
    fetcher.models.write_text("a file stands in its place")

    assert fetcher()["code"] == 74


def test_a_disk_that_fills_up_on_the_way_is_the_local_disks_fault(hub, fetcher):
    hub.files = SMALL | {"model.safetensors": safetensors(500_000)}

    result = fetcher(env={"LARGEST_FILE_BYTES": "100000"})

    assert result["code"] == 74, result
    assert "--workdir" in result["message"]


# Local folders and stores need no process of their own.


def never() -> bool:
    return False


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def take(source: str, models_folder: Path, **more: Any) -> BaseModel:
    identity = identify(source, None, settings=StoreSettings())
    return fetch(identity, models_folder=models_folder, settings=StoreSettings(), should_stop=never, **more)


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:7], COMMIT.upper()])
def test_a_hub_id_without_a_full_commit_is_refused_with_the_key_to_set(revision):
    with pytest.raises(UsageError, match=r"model\.revision"):
        identify(REPO, revision, settings=StoreSettings())


def test_a_revision_of_a_local_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"model\.revision"):
        identify(str(tmp_path), COMMIT, settings=StoreSettings())


def test_a_local_folder_is_used_where_it_stands_however_it_is_written(tmp_path, monkeypatch):
    folder = write(tmp_path / "my model", {**MODEL, **NOISE})
    monkeypatch.chdir(tmp_path)

    models = [take(source, tmp_path / "models") for source in (str(folder), "./my model", folder.as_uri())]

    assert {model.folder.resolve() for model in models} == {folder}
    assert len({model.identity.revision for model in models}) == 1
    assert models[0].licence == "apache-2.0"
    assert models[0].bytes == sum(map(len, MODEL.values()))


def test_a_local_folders_identity_follows_what_can_change_the_model_and_nothing_else(tmp_path):
    def revision() -> str:
        return identify(str(tmp_path), None, settings=StoreSettings()).revision

    before = revision() if write(tmp_path, MODEL) else ""
    write(tmp_path, {"README.md": b"better words", "notes.txt": b"", "original/params.json": b"{}"})
    assert revision() == before

    write(tmp_path, {"tokenizer.json": b'{"changed": true}'})
    assert revision() != before

    write(tmp_path, MODEL | {"model.safetensors": safetensors(20, 100)})
    assert revision() != before


def test_a_local_folder_that_does_not_exist_or_holds_no_model_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="no such folder"):
        identify(str(tmp_path / "missing"), None, settings=StoreSettings())
    with pytest.raises(NotFoundError, match=r"config\.json"):
        identify(str(tmp_path), None, settings=StoreSettings())


@pytest.mark.parametrize("stored", [False, True])
def test_what_is_only_planned_needs_no_weights(bucket, tmp_path, stored):
    source = put(bucket, SMALL) if stored else str(write(tmp_path / "base", SMALL))
    with pytest.raises(NotFoundError, match=r"neither model\.safetensors nor"):
        identify(source, None, settings=StoreSettings())

    identity = identify(source, None, settings=StoreSettings(), complete=False)
    own = {"models_folder": tmp_path / "models", "settings": StoreSettings(), "should_stop": never, "weights": False}
    model = fetch(identity, complete=False, **own)
    assert (model.folder / "config.json").read_bytes() == SMALL["config.json"]
    with pytest.raises(NotFoundError, match=r"neither model\.safetensors nor"):
        fetch(identity, **own)


def test_a_missing_shard_of_a_local_folder_is_named(tmp_path):
    write(tmp_path, SMALL | {"model.safetensors.index.json": index("a.safetensors", "b.safetensors")})
    write(tmp_path, {"a.safetensors": safetensors(1)})

    with pytest.raises(NotFoundError, match=r"b\.safetensors"):
        take(str(tmp_path), tmp_path / "models")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 64,
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"a": 1}',
        safetensors(64)[:-1],
        safetensors(64) + b"more",
    ],
)
def test_nonsense_instead_of_safetensors_is_a_data_error(tmp_path, content):
    write(tmp_path, MODEL | {"model.safetensors": content})

    with pytest.raises(DataError, match=r"model\.safetensors"):
        take(str(tmp_path), tmp_path / "models")


def test_hashing_a_local_folder_can_be_stopped(tmp_path):
    write(tmp_path, MODEL)

    with pytest.raises(StopRequestedError):
        identify(str(tmp_path), None, settings=StoreSettings(), should_stop=lambda: True)


BOMB = b"---\n" + b"".join(
    b"a%d: &a%d {<<: [%s], k%d: 1}\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9) if n else b"{x: 1}", n)
    for n in range(12)
) + b"license: mit\n---\n"  # fmt: skip
"""Merged, nine times as many keys on each line."""


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"README.md": b"---\nlicense: llama2\n---\n"}, "llama2"),
        ({"README.md": b"---\nlicense: other\nlicense_name: tiny\n---\n"}, "tiny"),
        ({"README.md": b"---\nlicense: [mit, apache-2.0]\n---\n"}, "mit, apache-2.0"),
        ({"README.md": b"---\n: [broken\n---\n", "LICENSE.txt": b""}, "see LICENSE.txt"),
        ({"README.md": b"no front matter"}, None),
        ({"README.md": b"---\ndate: 2023-02-30\nlicense: mit\n---\n", "LICENSE": b""}, "see LICENSE"),
        ({"README.md": b"---\nlicense: {a: {b: c}}\n---\n"}, None),
        ({"README.md": b"---\nlicense: [1, mit, [2]]\n---\n"}, "mit"),
        ({"README.md": b"---\nlicense: " + b"x" * 5000 + b"\n---\n"}, "x" * 200),
        ({"README.md": b"---\nlicense: mit\nmore: " + b"[" * 60000 + b"\n---\n", "LICENSE": b""}, "see LICENSE"),
        ({"README.md": BOMB, "LICENSE": b""}, "see LICENSE"),
        ({"README.md": b"---\nlicense: mit\n---\n" + b"\0" * 10_000_000}, "mit"),
    ],
)
def test_the_licence_comes_from_the_card_or_from_the_files_name(tmp_path, files, said):
    write(tmp_path, MODEL | files)

    assert take(str(tmp_path), tmp_path / "models").licence == said


@pytest.fixture
def bucket(moto_http, s3_environment) -> Any:
    """An S3 bucket, with the environment that leads boto3 to it."""
    import boto3

    s3_environment(moto_http)
    bucket = boto3.resource("s3").Bucket(f"models-{uuid.uuid4().hex[:12]}")
    bucket.create()
    return bucket


def put(bucket: Any, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        bucket.put_object(Key=f"llama/{name}", Body=content)
    return f"s3://{bucket.name}/llama"


def test_a_model_in_a_store_is_copied_once_and_then_needs_no_store(bucket, tmp_path):
    source = put(bucket, {**MODEL, **NOISE})
    identity = identify(source, None, settings=StoreSettings())

    first = take(source, tmp_path)
    bucket.objects.delete()
    second = fetch(identity, models_folder=tmp_path, settings=StoreSettings(), should_stop=never)

    assert first == second
    assert first.folder == tmp_path / identity.revision
    assert {name: (first.folder / name).read_bytes() for name in MODEL} == MODEL
    assert not [name for name in NOISE if name != "consolidated.safetensors" and (first.folder / name).exists()]
    assert (first.licence, first.bytes) == ("apache-2.0", sum(map(len, MODEL.values())))


def headers_of(source: str, models_folder: Path) -> Any:
    identity = identify(source, None, settings=StoreSettings())
    return read_headers(identity, models_folder=models_folder, settings=StoreSettings(), should_stop=never)


def test_the_headers_of_a_model_in_a_store_or_a_folder_are_read_without_its_weights(bucket, tmp_path):
    files = SMALL | LARGE | {"model.safetensors.index.json": index(*LARGE)}
    stored, local = (
        headers_of(put(bucket, files), tmp_path / "models"),
        headers_of(str(write(tmp_path / "base", files)), tmp_path / "models"),
    )

    assert stored == local
    assert {name: [*header.shape] for name, header in stored.items()} == LARGE_SHAPES
    assert {header.dtype for header in stored.values()} == {"U8"}
    assert not list((tmp_path / "models").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model.safetensors": b"\2"}, "no safetensors header"),
        ({"model.safetensors": struct.pack("<Q", 9) + b"[[[[[[[[["}, "nonsense in the safetensors header"),
        ({"model.safetensors": struct.pack("<Q", 8) + b'{"a":{}}'}, r"nonsense in the safetensors header \(KeyError\)"),
        (
            {
                "model.safetensors.index.json": index("a.safetensors", "b.safetensors"),
                "a.safetensors": safetensors(1, 2),
                "b.safetensors": safetensors(3, first=1),
            },
            "b.safetensors: t1 stands in another file as well",
        ),
    ],
    ids=["short", "no JSON", "no shapes", "twice"],
)
def test_a_header_that_says_nothing_is_a_data_error(bucket, tmp_path, files, said):
    with pytest.raises(DataError, match=said):
        headers_of(put(bucket, SMALL | files), tmp_path)


FP8 = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


@pytest.mark.parametrize("where", ["folder", "store"])
def test_a_base_that_is_quantised_already_is_refused_by_its_small_files(bucket, tmp_path, where):
    card = b"---\nbase_model: someone/whole\n---\n"
    files = MODEL | {"config.json": json.dumps(FP8).encode(), "README.md": card}
    source = put(bucket, files) if where == "store" else str(write(tmp_path / "base", files))

    with pytest.raises(UsageError, match=r"by FP8, a scale a block, .*; someone/whole may be the model that it was"):
        take(source, tmp_path / "models")
    assert not list((tmp_path / "models").rglob("*.safetensors"))


@pytest.mark.parametrize("names", [["model-Q4_K_M.gguf"], ["model.gguf", "config.json"]])
def test_a_gguf_is_refused_as_what_it_is(bucket, tmp_path, names):
    files = dict.fromkeys(names, b"{}")
    for source in (put(bucket, files), str(write(tmp_path / "base", files)), str(tmp_path / "base" / names[0])):
        with pytest.raises(UsageError, match=r"by GGUF, .*take the unquantised model"):
            identify(source, None, settings=StoreSettings())


def test_a_gguf_on_the_hub_is_refused_with_the_model_that_its_name_has(hub, fetcher):
    hub.files = {"tiny-llama.Q4_K_M.gguf": b"GGUF", "README.md": b""}
    result = fetcher()
    assert result["code"] == 64
    assert "by GGUF" in result["message"]


def test_a_store_copy_stopped_between_files_is_not_complete_and_goes_on(bucket, tmp_path):
    shards = {"a.safetensors": safetensors(70_000), "b.safetensors": safetensors(60_000)}
    source = put(bucket, SMALL | shards | {"model.safetensors.index.json": index(*shards)})
    identity = identify(source, None, settings=StoreSettings())
    seen = []

    with pytest.raises(StopRequestedError):
        fetch(
            identity,
            models_folder=tmp_path,
            settings=StoreSettings(),
            should_stop=lambda: bool(seen),
            on_progress=lambda done, _of: seen.append(done),
        )
    assert seen
    assert not (tmp_path / identity.revision / "b.safetensors").exists()

    told = []
    model = fetch(
        identity,
        models_folder=tmp_path,
        settings=StoreSettings(),
        should_stop=never,
        on_progress=lambda done, of: told.append((done, of)),
    )
    assert {name: (model.folder / name).read_bytes() for name in shards} == shards
    assert told[-1] == (sum(map(len, shards.values())),) * 2


def test_a_model_that_changed_in_the_store_is_not_taken_for_the_one_the_run_began_with(bucket, tmp_path):
    source = put(bucket, MODEL)
    identity = identify(source, None, settings=StoreSettings())
    put(bucket, {"model.safetensors": safetensors(20, 100)})

    with pytest.raises(NotFoundError, match="changed since"):
        fetch(identity, models_folder=tmp_path, settings=StoreSettings(), should_stop=never)
    assert identify(source, None, settings=StoreSettings()) != identity


def test_an_unusable_model_in_a_store_is_refused_before_it_is_copied(bucket, tmp_path):
    with pytest.raises(NotFoundError, match="no objects"):
        identify(f"s3://{bucket.name}/nothing", None, settings=StoreSettings())

    source = put(bucket, SMALL | {"pytorch_model.bin": b"x"})
    with pytest.raises(UsageError, match="pickle"):
        identify(source, None, settings=StoreSettings())

    put(bucket, {"model.safetensors.index.json": index("a.safetensors")})
    with pytest.raises(NotFoundError, match=r"a\.safetensors"):
        take(source, tmp_path)
