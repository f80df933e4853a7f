"""The commit protocol on every store. The classes ask for a fixture `root`: a fresh store's URI."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from job.core.errors import DataError, NotFoundError, RunConflictError
from job.edge.run.artifacts import Artifacts, runs_of
from job.edge.run.checkpoints import Checkpoint
from job.edge.store.objects import PreconditionError, StoreSettings
from job.edge.store.opening import open_store

FILES = {"adapter_model.safetensors": b"weights", "state.json": b"{}"}


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


class Order:
    """A real store that remembers in which order it was written to and deleted from."""

    def __init__(self, store) -> None:
        self._store = store
        self.done: list[tuple[str, str]] = []
        self.dies_at: str | None = None

    def _note(self, what, key):
        if self.dies_at is not None and key.endswith(self.dies_at):
            raise RuntimeError("killed here")
        self.done.append((what, key.rpartition("/")[2]))

    def upload(self, path, key, *, create_only=False, if_match=None, should_stop):
        self._note("upload", key)
        return self._store.upload(path, key, create_only=create_only, if_match=if_match, should_stop=should_stop)

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


def flip(content):
    return bytes([content[0] ^ 1]) + content[1:]


def without(name):
    """A manifest that does not name a file."""

    def shortened(content):
        manifest = json.loads(content)
        del manifest["files"][name]
        return json.dumps(manifest).encode()

    return shortened


def sized(name, size):
    """A manifest that gives a file this size."""

    def changed(content):
        manifest = json.loads(content)
        manifest["files"][name]["size"] = size
        return json.dumps(manifest).encode()

    return changed


DAMAGE = {
    "a flipped bit": ("state.json", flip, "sha256"),
    "a missing file": ("state.json", None, "state.json"),
    "a file cut short": ("state.json", lambda _: b"", "has 0 bytes"),
    "another byte": ("state.json", lambda content: b"x" * len(content), "sha256"),
    "no manifest": ("MANIFEST.json", None, "no MANIFEST.json"),
    "half a manifest": ("MANIFEST.json", lambda _: b'{"files": {"sta', "damaged"),
    "a manifest of another kind": ("MANIFEST.json", lambda _: b'{"files": [1]}', "damaged"),
    "a manifest of another step": ("MANIFEST.json", lambda m: m.replace(b'"step": 10', b'"step": 11'), "damaged"),
    "a manifest of another attempt": (
        "MANIFEST.json",
        lambda m: m.replace(b'"attempt": 1', b'"attempt": 3'),
        "damaged",
    ),
    "a manifest with another word": ("MANIFEST.json", lambda m: m.replace(b'"fence"', b'"fenge"'), "damaged"),
    "a manifest without end": ("MANIFEST.json", lambda _: b'{"files":' + b"[" * 100_000, "damaged"),
    "a manifest of a size that no disk has": ("MANIFEST.json", sized("state.json", 1 << 60), "in the manifest"),
    "a manifest of another size": ("MANIFEST.json", sized("state.json", 1), "1 in the manifest"),
    "a manifest that names too few": ("MANIFEST.json", without("state.json"), "does not name state.json"),
    "a manifest that reaches out": (
        "MANIFEST.json",
        lambda _: b'{"files": {"../../x": {"size": 1, "sha256": "0"}}}',
        "no plain file name",
    ),
}


def damage(store, checkpoint, name, how):
    """Change one object of a checkpoint behind the job's back; None: delete it."""
    key = f"runs/r1/checkpoints/{checkpoint.name}/{name}"
    if how is None:
        store.delete([key])
    else:
        store.write(key, how(store.read(key)[0]))


class PlainArtifactsContract:
    """What holds also on a store without conditional writes."""

    @pytest.fixture
    def opened(self, root):
        return lambda: open_store(root, StoreSettings())

    @pytest.fixture
    def run(self, opened):
        """Opens the run anew, as another process does."""
        return lambda run_id="r1": Artifacts(opened(), run_id)

    @pytest.fixture
    def artifacts(self, run):
        return run()

    def test_the_manifest_is_written_last_and_create_only(self, opened, tmp_path):
        store = Order(opened())
        publish(Artifacts(store, "r1"), tmp_path, at(5))
        assert store.done == [
            ("upload", "adapter_model.safetensors"),
            ("upload", "state.json"),
            ("create", "MANIFEST.json"),
            ("write", "latest.json"),
        ]

    @pytest.mark.parametrize("where", ["adapter_model.safetensors", "state.json", "MANIFEST.json"])
    def test_a_kill_at_any_write_leaves_no_checkpoint(self, opened, run, tmp_path, where):
        store = Order(opened())
        store.dies_at = where
        with pytest.raises(RuntimeError):
            publish(Artifacts(store, "r1"), tmp_path, at(5))
        assert run().checkpoints() == []
        assert run().fetch_newest(tmp_path / "back", should_stop=never)[0] is None

    def test_a_kill_between_manifest_and_hint_leaves_a_checkpoint(self, opened, run, tmp_path):
        store = Order(opened())
        store.dies_at = "latest.json"
        with pytest.raises(RuntimeError):
            publish(Artifacts(store, "r1"), tmp_path, at(5))
        assert run().fetch_newest(tmp_path / "back", should_stop=never)[0] == at(5)

    def test_a_checkpoint_comes_back_as_it_was_and_a_part_of_it_when_asked(self, artifacts, tmp_path):
        publish(artifacts, tmp_path, at(5))
        artifacts.fetch_checkpoint(at(5), tmp_path / "back", should_stop=never)
        assert (tmp_path / "back/state.json").read_bytes() == b"{}step-000005-a01"
        assert {p.name for p in (tmp_path / "back").iterdir()} == set(FILES)
        artifacts.fetch_checkpoint(at(5), tmp_path / "part", should_stop=never, only=["state.json"])
        assert [p.name for p in (tmp_path / "part").iterdir()] == ["state.json"]

    def test_the_same_checkpoint_is_never_committed_twice(self, artifacts, tmp_path):
        publish(artifacts, tmp_path, at(5))
        publish(artifacts, tmp_path, at(5))  # the same again: an earlier try whose answer was lost
        (tmp_path / "local" / at(5).name / "state.json").write_bytes(b"another")
        with pytest.raises(PreconditionError):
            artifacts.publish_checkpoint(tmp_path / "local" / at(5).name, at(5))

    def test_checkpoints_are_ordered_by_step_then_attempt_also_beyond_the_padding(self, artifacts, tmp_path):
        publish(artifacts, tmp_path, at(1_000_000), at(20, 2), at(20, 1), at(999_999, 120))
        assert artifacts.checkpoints() == [at(20, 1), at(20, 2), at(999_999, 120), at(1_000_000)]

    def test_the_hint_is_only_a_hint(self, artifacts, opened, tmp_path):
        publish(artifacts, tmp_path, at(5), at(10))
        hint, store = "runs/r1/latest.json", opened()
        assert json.loads(store.read(hint)[0])["checkpoint"] == "step-000010-a01"
        store.write(hint, b'{"checkpoint": "step-000099-a01"}')
        assert artifacts.fetch_newest(tmp_path / "a", should_stop=never)[0] == at(10)
        store.delete([hint])
        assert artifacts.fetch_newest(tmp_path / "b", should_stop=never)[0] == at(10)

    @pytest.mark.parametrize("kind", DAMAGE)
    def test_a_damaged_checkpoint_is_passed_over_with_the_reason(self, artifacts, opened, tmp_path, kind):
        file, how, word = DAMAGE[kind]
        publish(artifacts, tmp_path, at(5), at(10))
        damage(opened(), at(10), file, how)
        newest, passed_over = artifacts.fetch_newest(tmp_path / "back", should_stop=never, only=FILES)
        assert newest == at(5)
        ((name, reason),) = [(each["checkpoint"], each["reason"]) for each in passed_over]
        assert name == at(10).name
        assert word in reason
        assert [p.name for p in (tmp_path / "back").iterdir()] == [at(5).name]

    def test_when_nothing_verifies_there_is_no_checkpoint_and_every_reason(self, artifacts, opened, tmp_path):
        publish(artifacts, tmp_path, at(5), at(10))
        for checkpoint in (at(5), at(10)):
            damage(opened(), checkpoint, "state.json", flip)
        newest, passed_over = artifacts.fetch_newest(tmp_path / "back", should_stop=never)
        assert newest is None
        assert [each["checkpoint"] for each in passed_over] == [at(10).name, at(5).name]

    def test_retention_keeps_the_newest_and_the_candidates(self, artifacts, tmp_path):
        publish(artifacts, tmp_path, *(at(step) for step in range(10, 70, 10)))
        artifacts.retain({20, 30}, newest=2)
        assert artifacts.checkpoints() == [at(20), at(30), at(50), at(60)]
        artifacts.retain((), newest=1)
        assert artifacts.checkpoints() == [at(60)]

    def test_of_a_candidate_step_the_last_attempt_is_kept(self, artifacts, tmp_path):
        publish(artifacts, tmp_path, at(10, 1), at(10, 2), at(20, 2))
        artifacts.retain({10}, newest=1)
        assert artifacts.checkpoints() == [at(10, 2), at(20, 2)]

    def test_retention_deletes_the_manifest_first(self, opened, run, tmp_path):
        store = Order(opened())
        publish(Artifacts(store, "r1"), tmp_path, at(10), at(20))
        store.done.clear()
        store.dies_at = "state.json"
        with pytest.raises(RuntimeError):
            Artifacts(store, "r1").retain((), newest=1)
        assert store.done[0] == ("delete", "MANIFEST.json")
        assert run().checkpoints() == [at(20)]

    def test_what_killed_attempts_left_half_done_goes_once_a_later_one_commits(self, artifacts, opened, tmp_path):
        store = opened()
        publish(artifacts, tmp_path, at(10, 1), at(20, 1), at(30, 2), at(40, 2))
        damage(store, at(20, 1), "MANIFEST.json", None)  # killed while it uploaded
        damage(store, at(40, 2), "MANIFEST.json", None)  # of the attempt that may be uploading it now
        artifacts.retain((), newest=5)
        assert artifacts.checkpoints() == [at(10, 1), at(30, 2)]
        assert [*store.list(f"runs/r1/checkpoints/{at(20, 1).name}/")] == []
        assert len([*store.list(f"runs/r1/checkpoints/{at(40, 2).name}/")]) == len(FILES)

    def test_a_run_is_frozen_once_and_another_recipe_is_refused(self, artifacts, run):
        artifacts.begin_run({"recipe": {"r": 1}})
        run().begin_run({"recipe": {"r": 1}})
        with pytest.raises(RunConflictError, match="another recipe or other data"):
            run().begin_run({"recipe": {"r": 2}})
        assert artifacts.run_record() == {"recipe": {"r": 1}}

    def test_the_first_report_holds(self, artifacts):
        assert artifacts.report() is None
        artifacts.publish_report(b'{"first": true}')
        artifacts.publish_report(b'{"first": false}')
        assert artifacts.report() == {"first": True}

    @pytest.mark.parametrize("content", [b"", b"[1]", b"{"])
    def test_a_record_that_is_not_ours_is_a_failure_that_names_it(self, artifacts, opened, content):
        opened().write("runs/r1/report.json", content)
        with pytest.raises(DataError, match=r"report\.json: not"):
            artifacts.report()

    def test_the_adapter_comes_back_verified(self, artifacts, opened, tmp_path):
        key, store = "runs/r1/adapter/adapter_config.json", opened()
        folder = tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        files = artifacts.publish_adapter(folder)
        artifacts.fetch_adapter(tmp_path / "back", files, should_stop=never)
        assert (tmp_path / "back/adapter_config.json").read_text() == "{}"
        store.write(key, b"[]")
        with pytest.raises(DataError):
            artifacts.fetch_adapter(tmp_path / "again", files, should_stop=never)
        store.delete([key])
        with pytest.raises(NotFoundError):
            artifacts.fetch_adapter(tmp_path / "again", files, should_stop=never)

    def test_runs_are_found_by_the_beginning_of_their_id(self, run, opened):
        for run_id in ("abc-1", "abc-2", "abd-1"):
            run(run_id).begin_run({})
        assert [a.run_id for a in runs_of(opened(), "abc-")] == ["abc-1", "abc-2"]

    def test_two_attempts_at_one_step_count_once_among_the_newest(self, artifacts, tmp_path):
        """After a resume the last step stands twice; the steps before it are the ones to fall back to."""
        publish(artifacts, tmp_path, at(4), at(8), at(8, 2), at(12, 2))
        artifacts.retain((), newest=3)
        assert artifacts.checkpoints() == [at(4), at(8, 2), at(12, 2)]


class ArtifactsContract(PlainArtifactsContract):
    """And with conditional writes."""

    def test_attempts_that_begin_at_once_never_get_the_same_number(self, run):
        together = threading.Barrier(8)

        def begin(host):
            artifacts = run()
            together.wait()
            return artifacts.begin_attempt({"host": str(host), "started": "now"})

        with ThreadPoolExecutor(8) as pool:
            numbers = list(pool.map(begin, range(8)))
        assert sorted(numbers) == list(range(1, 9))
        told = {facts["host"]: facts["number"] for facts in run().attempts()}
        assert [told[str(host)] for host in range(8)] == numbers
