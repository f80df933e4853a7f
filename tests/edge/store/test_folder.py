"""A folder committed by its manifest: what is not whole does not exist, in a store and on the local disk."""

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
from store_contract import never

from job.core.errors import DataError, LocalDiskError, NotFoundError, StopRequestedError
from job.edge.store.directory import DirectoryStore
from job.edge.store.folder import (
    MANIFEST,
    FileEntry,
    LocalFolder,
    StoredFolder,
    plain_name,
    refuse_if_full,
    total_bytes,
)
from job.edge.store.objects import PreconditionError

FACTS = {"step": 5, "fence": 1}
FILES = {"a.bin": b"weights", "templates/tool_é.jinja": b"{}"}


def is_ours(facts):
    return facts == FACTS


def entry(content):
    return FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())


ENTRIES = {name: entry(content) for name, content in FILES.items()}


class Kind:
    """Either kind of folder, and where its files really stand."""

    def __init__(self, kind, folder):
        self.path = folder / "store/runs/a" if kind == "stored" else folder / "a"
        self._sources = folder / "sources"
        self._stored = StoredFolder(DirectoryStore(folder / "store"), "runs/a") if kind == "stored" else None
        self.folder = self._stored or LocalFolder(self.path)

    def commit(self, facts=FACTS):
        return self.folder.commit(facts) if self._stored is None else self.folder.commit(facts, create_only=True)

    def write(self, name, content):
        if self._stored is None:
            return self.folder.write(name, lambda: content)
        source = self._sources / name
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_bytes(content)
        return self.folder.upload(source, name, should_stop=never)

    def make(self, files=FILES, facts=FACTS):
        with self.commit(facts) as entries:
            for name, content in files.items():
                entries[name] = self.write(name, content)
        return self

    def names(self):
        return {str(path.relative_to(self.path)) for path in self.path.rglob("*") if path.is_file()}


@pytest.fixture(params=["stored", "local"])
def kind(request, tmp_path):
    return Kind(request.param, tmp_path)


@pytest.fixture
def stored(tmp_path):
    return Kind("stored", tmp_path).make().folder


# --- committing ------------------------------------------------------------------------------------------------------


def test_the_manifest_is_written_when_all_files_stand_and_names_each_of_them(kind):
    with kind.commit() as entries:
        for name, content in FILES.items():
            entries[name] = kind.write(name, content)
        assert kind.names() == {*FILES}
        with pytest.raises(NotFoundError):
            kind.folder.manifest(is_ours)

    manifest = kind.folder.manifest(is_ours)
    assert (manifest.facts, manifest.files) == (FACTS, ENTRIES)
    assert kind.names() == {*FILES, MANIFEST}


def test_a_failure_between_two_files_leaves_no_folder(kind):
    with contextlib.suppress(RuntimeError), kind.commit() as entries:
        entries["a.bin"] = kind.write("a.bin", FILES["a.bin"])
        raise RuntimeError

    assert kind.names() == {"a.bin"}
    with pytest.raises(NotFoundError):
        kind.folder.manifest(is_ours)


def test_both_kinds_write_the_same_manifest(tmp_path):
    written = [(Kind(kind, tmp_path).make().path / MANIFEST).read_bytes() for kind in ("stored", "local")]

    assert written[0] == written[1]
    content = {**FACTS, "files": {name: {"size": e.size, "sha256": e.sha256} for name, e in ENTRIES.items()}}
    assert written[0] == json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


@pytest.mark.parametrize("written", [{"indent": 2}, {"sort_keys": True, "indent": 2, "ensure_ascii": False}, {}])
def test_a_manifest_that_was_written_in_another_form_is_still_read(kind, written):
    """Earlier versions kept the order of the keys, or wrote letters as escapes: what counts is the content."""
    kind.make()
    content = json.loads((kind.path / MANIFEST).read_bytes())
    (kind.path / MANIFEST).write_bytes(json.dumps({"files": content.pop("files"), **content}, **written).encode())

    assert kind.folder.manifest(is_ours).files == ENTRIES


def test_a_create_only_commit_is_repeated_but_never_replaced(tmp_path):
    kind = Kind("stored", tmp_path).make()
    kind.make()  # an earlier try whose answer was lost
    for files, facts in (({"a.bin": b"others"}, FACTS), (FILES, FACTS | {"fence": 2})):
        with pytest.raises(PreconditionError):
            kind.make(files, facts)
    (kind.path / MANIFEST).write_bytes(b"rubbish")
    with pytest.raises(PreconditionError):
        kind.make()

    with kind.folder.commit(FACTS, create_only=False) as entries:
        entries.update(ENTRIES)
    assert kind.folder.manifest(is_ours).files == ENTRIES


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda content: content[: len(content) // 2],
        lambda _: b"\xff{}",
        lambda _: b"[]",
        lambda _: b'{"files":' + b"[" * 100_000,
        lambda _: b'{"step": 5, "fence": 1}',
        lambda _: b'{"step": 5, "fence": 1, "files": {}}',
        lambda _: b'{"step": 5, "fence": 1, "files": [1]}',
        lambda content: content.replace(b'"step": 5', b'"step": 6'),
        lambda content: content.replace(b'"fence"', b'"fenge"'),
        lambda content: content.replace(b'"size": 7', b'"size": -7'),
        lambda content: content.replace(b'"size": 7', b'"size": 7.0'),
        lambda content: content.replace(b'"size": 7', b'"size": true'),
        lambda content: content.replace(b'"size": 7', b'"size": 7, "mode": 1'),
        lambda content: content.replace(b'"sha256": "', b'"sha256": "0'),
        lambda content: content.replace(b"a.bin", b"../a.bin"),
    ],
)
def test_a_manifest_that_is_not_what_was_written_is_damaged(kind, damage):
    content = (kind.make().path / MANIFEST).read_bytes()
    assert damage(content) != content
    (kind.path / MANIFEST).write_bytes(damage(content))

    with pytest.raises(DataError, match=f"{MANIFEST}: damaged"):
        kind.folder.manifest(is_ours)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/a", "a/../b", "a/b/c", "a//b", "a/", ".a", "a\\b", "a\n"])
def test_a_name_that_could_reach_out_is_refused(stored, tmp_path, name):
    with pytest.raises(DataError, match="no plain file name"):
        plain_name(name)
    with pytest.raises(DataError, match="no plain file name"):
        stored.download({name: ENTRIES["a.bin"]}, tmp_path / "back", should_stop=never)
    assert [*(tmp_path / "back").iterdir()] == []


@pytest.mark.parametrize("name", [*FILES, "model-00001.safetensors", "vocab_2.txt"])
def test_other_names_are_let_through(name):
    assert plain_name(name) == name


def test_files_arrive_verified_with_the_progress_of_all_of_them(stored, tmp_path):
    arrived, progress = [], []
    stored.download(
        ENTRIES,
        tmp_path / "back",
        should_stop=never,
        on_file=lambda: arrived.append({path.name for path in (tmp_path / "back").rglob("*") if path.is_file()}),
        on_progress=lambda done, of: progress.append((done, of)),
    )

    assert {name: (tmp_path / "back" / name).read_bytes() for name in FILES} == FILES
    assert arrived == [{"a.bin"}, {"a.bin", "tool_é.jinja"}]
    assert progress == [(7, 9), (9, 9)]


def test_a_file_that_is_not_what_its_entry_says_does_not_arrive(stored, tmp_path):
    with pytest.raises(DataError, match="sha256"):
        stored.download({"a.bin": entry(b"Weights")}, tmp_path / "back", should_stop=never)
    with pytest.raises(NotFoundError):
        stored.download({"b.bin": entry(b"")}, tmp_path / "back", should_stop=never)
    with pytest.raises(StopRequestedError):
        stored.download(ENTRIES, tmp_path / "back", should_stop=lambda: True)
    assert [*(tmp_path / "back").iterdir()] == []


def test_a_file_in_the_store_of_another_size_is_refused_before_it_moves(stored):
    stored.refuse_other_sizes(ENTRIES | {"gone.bin": entry(b"")})  # that one is not found when it is asked for
    with pytest.raises(DataError, match=r"a\.bin: has 7 bytes, 8 in the manifest"):
        stored.refuse_other_sizes({"a.bin": entry(b"weights!")})


def test_a_folder_without_room_for_its_files_is_refused(tmp_path):
    refuse_if_full(tmp_path / "new", needed_bytes=total_bytes(ENTRIES))
    assert (tmp_path / "new").is_dir()
    with pytest.raises(LocalDiskError, match=r"1,152,921,504,606,846,976 bytes should be free"):
        refuse_if_full(tmp_path / "new", needed_bytes=1 << 60)


def test_damaged_and_missing_local_files_are_named(tmp_path):
    kind = Kind("local", tmp_path).make(dict.fromkeys(("whole", "flipped", "cut", "gone"), b"1234"))
    files = kind.folder.manifest(is_ours).files
    (kind.path / "flipped").write_bytes(b"1235")
    (kind.path / "cut").write_bytes(b"123")
    (kind.path / "gone").unlink()

    assert kind.folder.damaged(files, never) == ["cut", "flipped", "gone"]
    assert kind.folder.damaged({"whole": files["whole"]}, never) == []
    with pytest.raises(StopRequestedError):
        kind.folder.damaged(files, lambda: True)


# --- deleting --------------------------------------------------------------------------------------------------------


def test_a_folder_that_was_withdrawn_does_not_exist_though_its_files_stand(kind):
    kind.make().folder.withdraw()

    with pytest.raises(NotFoundError):
        kind.folder.manifest(is_ours)
    assert kind.names() == {*FILES}
    kind.folder.withdraw()  # it is no error that there is none


def test_deleting_a_stored_folder_takes_the_manifest_first(stored, tmp_path):
    place, seen = tmp_path / "store/runs/a", []
    (tmp_path / "store/runs/ab").mkdir()
    (tmp_path / "store/runs/ab/other").write_bytes(b"")
    stored.delete(on_withdrawn=lambda: seen.append({path.name for path in place.rglob("*") if path.is_file()}))

    assert seen == [{Path(name).name for name in FILES}]
    assert not place.exists()
    assert (tmp_path / "store/runs/ab/other").exists()


def test_a_kill_while_a_folder_is_deleted_leaves_none(stored, tmp_path):
    def killed():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        stored.delete(on_withdrawn=killed)

    with pytest.raises(NotFoundError):
        stored.manifest(is_ours)
    assert stored.sizes() == {name: len(content) for name, content in FILES.items()}
    stored.delete()
    assert stored.sizes() == {}


def test_deleting_a_local_folder_leaves_nothing(tmp_path):
    kind = Kind("local", tmp_path).make()
    kind.folder.delete()
    assert not kind.path.exists()
    kind.folder.delete()
