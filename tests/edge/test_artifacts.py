"""The commit protocol: files first, manifest last; what is not whole does not exist."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.core.errors import DataError, NotFoundError, RunConflictError, StopRequestedError
from job.edge.artifacts import Artifacts, Checkpoint, runs_of
from job.edge.storage import PreconditionError, StoreSettings, open_store

FILES = {"adapter_model.safetensors": b"weights", "state.json": b"{}"}


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


def opened(root, run_id="r1"):
    return Artifacts(open_store(f"file://{root}", StoreSettings()), run_id)


@pytest.fixture
def artifacts(root):
    return opened(root)


def never():
    return False


def at(step, attempt=1):
    return Checkpoint(step=step, attempt=attempt)


def publish(artifacts, folder, *checkpoints):
    for checkpoint in checkpoints:
        here = folder / "local" / checkpoint.name
        here.mkdir(parents=True, exist_ok=True)
        for name, content in FILES.items():
            (here / name).write_bytes(content + checkpoint.name.encode())
        artifacts.publish_checkpoint(here, checkpoint)


def place(root, checkpoint):
    return root / "runs/r1/checkpoints" / checkpoint.name


class Order:
    """A real store that remembers in which order it was written to and deleted from."""

    def __init__(self, root: Path) -> None:
        self._store = open_store(f"file://{root}", StoreSettings())
        self.done: list[tuple[str, str]] = []
        self.dies_at: str | None = None

    def _note(self, what, key):
        if self.dies_at is not None and key.endswith(self.dies_at):
            raise RuntimeError("killed here")
        self.done.append((what, key.rpartition("/")[2]))

    def upload(self, path, key, *, should_stop):
        self._note("upload", key)
        return self._store.upload(path, key, should_stop=should_stop)

    def write(self, key, data, *, create_only=False, if_match=None):
        self._note("create" if create_only else "write", key)
        return self._store.write(key, data, create_only=create_only, if_match=if_match)

    def delete(self, keys):
        keys = list(keys)
        for key in keys:
            self._note("delete", key)
        self._store.delete(keys)

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_the_manifest_is_written_last_and_create_only(root, tmp_path):
    store = Order(root)
    publish(Artifacts(store, "r1"), tmp_path, at(5))
    assert store.done == [
        ("upload", "adapter_model.safetensors"),
        ("upload", "state.json"),
        ("create", "MANIFEST.json"),
        ("write", "latest.json"),
    ]


@pytest.mark.parametrize("where", ["adapter_model.safetensors", "state.json", "MANIFEST.json"])
def test_a_kill_at_any_write_leaves_no_checkpoint(root, tmp_path, where):
    store = Order(root)
    store.dies_at = where
    with pytest.raises(RuntimeError):
        publish(Artifacts(store, "r1"), tmp_path, at(5))
    assert opened(root).checkpoints() == []
    assert opened(root).fetch_newest(tmp_path / "back", should_stop=never)[0] is None


def test_a_kill_between_manifest_and_hint_leaves_a_checkpoint(root, tmp_path):
    store = Order(root)
    store.dies_at = "latest.json"
    with pytest.raises(RuntimeError):
        publish(Artifacts(store, "r1"), tmp_path, at(5))
    assert opened(root).fetch_newest(tmp_path / "back", should_stop=never)[0] == at(5)


def test_a_checkpoint_comes_back_as_it_was_and_a_part_of_it_when_asked(artifacts, tmp_path):
    publish(artifacts, tmp_path, at(5))
    artifacts.fetch_checkpoint(at(5), tmp_path / "back", should_stop=never)
    assert (tmp_path / "back/state.json").read_bytes() == b"{}step-000005-a01"
    assert {p.name for p in (tmp_path / "back").iterdir()} == set(FILES)
    artifacts.fetch_checkpoint(at(5), tmp_path / "part", should_stop=never, only=["state.json"])
    assert [p.name for p in (tmp_path / "part").iterdir()] == ["state.json"]


def test_the_same_checkpoint_is_never_committed_twice(artifacts, tmp_path):
    publish(artifacts, tmp_path, at(5))
    with pytest.raises(PreconditionError):
        publish(artifacts, tmp_path, at(5))


def test_checkpoints_are_ordered_by_step_then_attempt_also_beyond_the_padding(artifacts, tmp_path):
    publish(artifacts, tmp_path, at(1_000_000), at(20, 2), at(20, 1), at(999_999, 120))
    assert artifacts.checkpoints() == [at(20, 1), at(20, 2), at(999_999, 120), at(1_000_000)]


def test_the_hint_is_only_a_hint(artifacts, root, tmp_path):
    publish(artifacts, tmp_path, at(5), at(10))
    hint = root / "runs/r1/latest.json"
    assert json.loads(hint.read_text())["checkpoint"] == "step-000010-a01"
    hint.write_text('{"checkpoint": "step-000099-a01"}')
    assert artifacts.fetch_newest(tmp_path / "a", should_stop=never)[0] == at(10)
    hint.unlink()
    assert artifacts.fetch_newest(tmp_path / "b", should_stop=never)[0] == at(10)


def flip(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": (lambda p: flip(p / "state.json"), "sha256"),
    "a missing file": (lambda p: (p / "state.json").unlink(), "state.json"),
    "a file cut short": (lambda p: (p / "state.json").write_bytes(b""), "sha256"),
    "no manifest": (lambda p: (p / "MANIFEST.json").unlink(), "no MANIFEST.json"),
    "half a manifest": (lambda p: (p / "MANIFEST.json").write_text('{"files": {"sta'), "damaged"),
    "a manifest of another kind": (lambda p: (p / "MANIFEST.json").write_text('{"files": [1]}'), "damaged"),
    "a manifest that reaches out": (
        lambda p: (p / "MANIFEST.json").write_text('{"files": {"../../x": {"size": 1, "sha256": "0"}}}'),
        "no plain file name",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(artifacts, root, tmp_path, kind):
    damage, word = DAMAGE[kind]
    publish(artifacts, tmp_path, at(5), at(10))
    damage(place(root, at(10)))
    newest, passed_over = artifacts.fetch_newest(tmp_path / "back", should_stop=never)
    assert newest == at(5)
    ((name, reason),) = [(each["checkpoint"], each["reason"]) for each in passed_over]
    assert name == at(10).name
    assert word in reason
    assert [p.name for p in (tmp_path / "back").iterdir()] == [at(5).name]


def test_when_nothing_verifies_there_is_no_checkpoint_and_every_reason(artifacts, root, tmp_path):
    publish(artifacts, tmp_path, at(5), at(10))
    for checkpoint in (at(5), at(10)):
        flip(place(root, checkpoint) / "state.json")
    newest, passed_over = artifacts.fetch_newest(tmp_path / "back", should_stop=never)
    assert newest is None
    assert [each["checkpoint"] for each in passed_over] == [at(10).name, at(5).name]


def test_fetching_stops_when_asked(artifacts, tmp_path):
    publish(artifacts, tmp_path, at(5))
    with pytest.raises(StopRequestedError):
        artifacts.fetch_newest(tmp_path / "back", should_stop=lambda: True)


def test_retention_keeps_the_newest_and_the_candidates(artifacts, tmp_path):
    publish(artifacts, tmp_path, *(at(step) for step in range(10, 70, 10)))
    artifacts.retain({20, 30}, newest=2)
    assert artifacts.checkpoints() == [at(20), at(30), at(50), at(60)]
    artifacts.retain((), newest=1)
    assert artifacts.checkpoints() == [at(60)]


def test_of_a_candidate_step_the_last_attempt_is_kept(artifacts, tmp_path):
    publish(artifacts, tmp_path, at(10, 1), at(10, 2), at(20, 2))
    artifacts.retain({10}, newest=1)
    assert artifacts.checkpoints() == [at(10, 2), at(20, 2)]


def test_retention_deletes_the_manifest_first(root, tmp_path):
    store = Order(root)
    publish(Artifacts(store, "r1"), tmp_path, at(10), at(20))
    store.done.clear()
    store.dies_at = "state.json"
    with pytest.raises(RuntimeError):
        Artifacts(store, "r1").retain((), newest=1)
    assert store.done[0] == ("delete", "MANIFEST.json")
    assert opened(root).checkpoints() == [at(20)]


def test_what_killed_attempts_left_half_done_goes_once_a_later_one_commits(artifacts, root, tmp_path):
    publish(artifacts, tmp_path, at(10, 1), at(20, 1), at(30, 2), at(40, 2))
    (place(root, at(20, 1)) / "MANIFEST.json").unlink()  # killed while it uploaded
    (place(root, at(40, 2)) / "MANIFEST.json").unlink()  # of the attempt that may be uploading it now
    artifacts.retain((), newest=5)
    assert artifacts.checkpoints() == [at(10, 1), at(30, 2)]
    assert not place(root, at(20, 1)).exists()
    assert place(root, at(40, 2)).exists()


def test_attempts_that_begin_at_once_never_get_the_same_number(root):
    together = threading.Barrier(8)

    def begin(host):
        artifacts = opened(root)
        together.wait()
        return artifacts.begin_attempt({"host": host, "started": "now"})

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(begin, range(8)))
    assert sorted(numbers) == list(range(1, 9))
    told = {facts["host"]: facts["number"] for facts in opened(root).attempts()}
    assert [told[host] for host in range(8)] == numbers


def test_attempts_are_told_in_order_with_how_each_ended(root):
    artifacts = opened(root, "a.json.run")  # a run id may hold what looks like an ending
    for number in range(1, 103):
        assert artifacts.begin_attempt({"host": "h"}) == number
    artifacts.end_attempt(2, {"exit_code": 75})
    artifacts.end_attempt(2, {"exit_code": 0})  # the first word holds
    told = artifacts.attempts()
    assert [facts["number"] for facts in told] == list(range(1, 103))
    assert told[0]["end"] is None
    assert told[1]["end"] == {"exit_code": 75}


def test_a_run_is_frozen_once_and_another_recipe_is_refused(artifacts, root):
    artifacts.begin_run({"recipe": {"r": 1}})
    opened(root).begin_run({"recipe": {"r": 1}})
    with pytest.raises(RunConflictError, match="another recipe or other data"):
        opened(root).begin_run({"recipe": {"r": 2}})
    assert artifacts.run_record() == {"recipe": {"r": 1}}


def test_the_first_report_holds(artifacts):
    assert artifacts.report() is None
    artifacts.publish_report(b'{"first": true}')
    artifacts.publish_report(b'{"first": false}')
    assert artifacts.report() == {"first": True}


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_record_that_is_not_ours_is_a_failure_that_names_it(artifacts, root, content):
    (root / "runs/r1").mkdir(parents=True)
    (root / "runs/r1/report.json").write_text(content)
    with pytest.raises(DataError, match=r"report\.json: not"):
        artifacts.report()


def test_the_adapter_comes_back_verified(artifacts, root, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    files = artifacts.publish_adapter(folder)
    artifacts.fetch_adapter(tmp_path / "back", files, should_stop=never)
    assert (tmp_path / "back/adapter_config.json").read_text() == "{}"
    (root / "runs/r1/adapter/adapter_config.json").write_text("[]")
    with pytest.raises(DataError):
        artifacts.fetch_adapter(tmp_path / "again", files, should_stop=never)
    (root / "runs/r1/adapter/adapter_config.json").unlink()
    with pytest.raises(NotFoundError):
        artifacts.fetch_adapter(tmp_path / "again", files, should_stop=never)


def test_runs_are_found_by_the_beginning_of_their_id(root):
    for run_id in ("abc-1", "abc-2", "abd-1"):
        opened(root, run_id).begin_run({})
    store = open_store(f"file://{root}", StoreSettings())
    assert [a.run_id for a in runs_of(store, "abc-")] == ["abc-1", "abc-2"]


def test_two_attempts_at_one_step_count_once_among_the_newest(artifacts, tmp_path):
    """After a resume the last step stands twice; the steps before it are the ones to fall back to."""
    publish(artifacts, tmp_path, at(4), at(8), at(8, 2), at(12, 2))
    artifacts.retain((), newest=3)
    assert artifacts.checkpoints() == [at(4), at(8, 2), at(12, 2)]
