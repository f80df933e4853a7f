"""A merged model appears whole in its place or not at all, in a folder of this machine and in a store."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from job.core.errors import LocalDiskError, LockedError, StopRequestedError, UsageError
from job.edge import exports
from job.edge.exports import EXPORT_JSON, ExportPlace
from job.edge.store.folder import MANIFEST
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store

FILES = {
    "model-00001-of-00002.safetensors": b"one" * 1000,
    "model-00002-of-00002.safetensors": b"two" * 1000,
    "config.json": b"{}",
    "additional_chat_templates/tool_use.jinja": b"{{ x }}",
    EXPORT_JSON: b'{"export_version": 1}',
}
FACTS = {"export_of": "file:///a/runs/b"}


def never():
    return False


def place_of(uri, tmp_path, should_stop=never):
    return ExportPlace(str(uri), StoreSettings(), workdir=tmp_path / "work", should_stop=should_stop)


def fill(place, *, commit=True, needed_bytes=0):
    with place.aside(needed_bytes=needed_bytes) as aside:
        for name, content in FILES.items():
            aside.write(name, [content[:1000], content[1000:]], lambda _: None)
        if commit:
            place.commit(aside, FACTS, lambda _done, _of: None)


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["folder", "volume", "store"])
def where(request, tmp_path, monkeypatch):
    """A place to export to, and what stands in it."""
    if request.param == "folder":
        return tmp_path / "models" / "merged", lambda: files_in(tmp_path / "models" / "merged")
    if request.param == "volume":
        volume = tmp_path / "volume"
        (volume / "lost+found").mkdir(parents=True)
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == volume)

        def outside_of_aside():
            return {name: content for name, content in files_in(volume).items() if not name.startswith(".unfinished/")}

        return volume, outside_of_aside
    root = request.getfixturevalue("moto_place").root
    store = open_store(root, StoreSettings())

    def found():
        names = [entry.key for entry in store.list("models/merged/")]
        return {name.removeprefix("models/merged/"): store.read(name)[0] for name in names}

    return f"{root}/models/merged", found


def test_it_is_there_whole_and_says_what_it_is(where, tmp_path):
    uri, found = where
    place = place_of(uri, tmp_path)
    assert place.whole() is None
    fill(place)

    there = found()
    manifest = there.pop(MANIFEST, None)
    assert there == FILES
    assert place.whole() == {"export_version": 1}
    assert place.holds({name: len(content) for name, content in FILES.items()})
    assert not place.holds({"config.json": 3})
    assert not place.holds({"other.json": 2})
    assert not (tmp_path / "work" / "exports").exists() or not any((tmp_path / "work" / "exports").iterdir())
    if not isinstance(uri, Path):
        assert {name: entry["size"] for name, entry in json.loads(manifest)["files"].items()} == {
            name: len(content) for name, content in FILES.items()
        }


def test_nothing_is_there_without_a_commit(where, tmp_path):
    uri, found = where
    fill(place_of(uri, tmp_path), commit=False)
    assert found() == {}
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nothing_is_there_after_a_stop(where, tmp_path):
    uri, found = where
    asked = iter([False, False, True])
    with pytest.raises(StopRequestedError):
        fill(place_of(uri, tmp_path, lambda: next(asked)))
    assert found() == {}


def test_what_is_not_ours_is_left_alone(where, tmp_path):
    uri, found = where
    if isinstance(uri, Path):
        uri.mkdir(parents=True, exist_ok=True)
        (uri / "thesis.tex").write_text("years of work")
    else:
        open_store(uri, StoreSettings()).write("thesis.tex", b"years of work")
    with pytest.raises(UsageError, match="is not empty, and holds no model of this job"):
        place_of(uri, tmp_path).whole()
    assert found() == {"thesis.tex": b"years of work"}


def test_the_rest_of_another_export_in_a_store_is_left_alone(moto_place, tmp_path):
    """It may still be at work, on another machine."""
    uri = f"{moto_place.root}/merged"
    store = open_store(uri, StoreSettings())
    store.write("UNFINISHED.json", b'{"export_of": "file:///a/runs/another"}')
    store.write("model.safetensors", b"half")
    with pytest.raises(UsageError, match="another export was begun there"):
        fill(place_of(uri, tmp_path))
    assert {entry.key for entry in store.list("")} == {"UNFINISHED.json", "model.safetensors"}


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/"])
def test_a_bucket_alone_is_no_place(uri, tmp_path):
    with pytest.raises(UsageError, match="name a folder in the bucket"):
        place_of(uri, tmp_path)


def test_a_volume_is_filled_with_its_config_last(tmp_path, monkeypatch):
    """Killed between two of its files, it is no model, and the next try clears them away."""
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == volume)
    moved, rename = [], Path.rename

    def dying(path, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(Path(target).name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dying)
    monkeypatch.setattr(exports.shutil, "rmtree", lambda *_, **__: None)  # as if killed
    with pytest.raises(KeyboardInterrupt):
        fill(place_of(volume, tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == volume)
    assert not (volume / "config.json").exists()
    assert len(moved) == 3
    place = place_of(volume, tmp_path)
    assert place.whole() is None
    fill(place)
    assert files_in(volume) == FILES


def test_a_file_is_no_place(tmp_path):
    (tmp_path / "merged").write_text("a")
    with pytest.raises(UsageError, match="is a file"):
        place_of(tmp_path / "merged", tmp_path).whole()


def test_what_came_there_meanwhile_is_left_alone(tmp_path):
    place = place_of(tmp_path / "merged", tmp_path)
    with place.aside(needed_bytes=0) as aside:
        aside.write("config.json", [b"{}"], lambda _: None)
        (tmp_path / "merged").mkdir()
        (tmp_path / "merged" / "other").write_text("a")
        with pytest.raises(UsageError, match="something came there meanwhile"):
            place.commit(aside, FACTS, lambda _done, _of: None)
    assert files_in(tmp_path / "merged") == {"other": b"a"}


def test_two_do_not_fill_the_same_place(where, tmp_path):
    uri, found = where
    with place_of(uri, tmp_path).aside(needed_bytes=0) as aside:
        aside.write("config.json", [b"{}"], lambda _: None)
        with pytest.raises(LockedError), place_of(uri, tmp_path).aside(needed_bytes=0):
            pass
        assert files_in(aside.path) == {"config.json": b"{}"}
    assert found() == {}


def test_a_disk_without_room_is_refused_before_anything_is_written(where, tmp_path):
    uri, found = where
    with pytest.raises(LocalDiskError, match="should be free"):
        fill(place_of(uri, tmp_path), needed_bytes=2**60)
    assert found() == {}


def killed(uri, tmp_path, at):
    """The process is killed at the n-th file that is written or uploaded, or at the commit."""
    calls = iter(range(100))

    def dying(method):
        def call(*args, **kwargs):
            result = method(*args, **kwargs)
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    exports.Aside.write = dying(exports.Aside.write)
    exports.StoredFolder.upload = dying(exports.StoredFolder.upload)
    fill(place_of(uri, tmp_path))


@pytest.mark.parametrize("at", range(2 * len(FILES)))
def test_killed_in_the_middle_nothing_looks_whole_and_the_next_one_does_it(where, at, tmp_path):
    uri, found = where
    is_local = isinstance(uri, Path)
    child = multiprocessing.get_context("fork").Process(target=killed, args=(uri, tmp_path, at))
    child.start()
    child.join(60)
    uploads_config = at == 2 * len(FILES) - 1
    if is_local and at >= len(FILES):
        assert child.exitcode == 0  # there is no upload to be killed in
        return
    assert child.exitcode == -signal.SIGKILL
    assert MANIFEST not in found()
    # What knows nothing of manifests takes no folder for a model before its last file is there.
    assert ("config.json" in found()) == (uploads_config and not is_local)
    place = place_of(uri, tmp_path)
    assert place.whole() is None
    fill(place)
    there = found()
    there.pop(MANIFEST, None)
    assert there == FILES
