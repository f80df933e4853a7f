"""Copies of a base in 4 bits: whole or not there, verified, never in the job's way."""

import json
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import structlog
from disks import largest_file

from job.core.errors import StopRequestedError, UnavailableError
from job.edge.base.fetching import BaseModelIdentity
from job.edge.base.quantised_copies import MANIFEST, QuantisedCopy
from job.edge.store.directory import DirectoryStore

IDENTITY = BaseModelIdentity(source="owner/name", revision="0" * 40)
FORM = {"quantisation": "nf4", "device": "CPU"}
SMALL = {"tokenizer.json": b"{}", "README.md": b"---\nlicense: apache-2.0\n---\n", "config.json": b'{"in": "16 bits"}'}
FILES = {
    "config.json": b'{"in": "4 bits"}',
    "model-00001.safetensors": b"1" * 5000,
    "model-00002.safetensors": b"2" * 3000,
    "model.safetensors.index.json": b"{}",
}


@pytest.fixture
def base(tmp_path):
    """The folder that the weights were loaded from."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name, content in {**SMALL, "model.safetensors": b"0" * 20_000, "modeling.py": b"import os"}.items():
        (folder / name).write_bytes(content)
    return folder


def _made(content):
    return content() if callable(content) else content


class Copies:
    """What a machine and a store have, and a new process each time."""

    def __init__(self, folder, base):
        self.models, self.base = folder / "models", base
        self.store = DirectoryStore(folder / "store")

    def copy(self, *, identity=IDENTITY, form=FORM, store=None, should_stop=lambda: False):
        return QuantisedCopy(identity, form, models_folder=self.models, store=store, should_stop=should_stop)

    def keep(self, *, files=FILES, needed_bytes=8000, **options):
        copy = self.copy(**options)
        copy.keep(
            ((name, partial(_made, content)) for name, content in files.items()),
            beside=self.base,
            needed_bytes=needed_bytes,
            on_beat=lambda: None,
        )
        return copy

    def found(self, **options):
        """The copy as a later start gets it, or None."""
        copy = self.copy(**options)
        small = copy.find()
        model = copy.bring(lambda _done, _of: None)
        assert small in (None, copy.folder)
        return None if small is None else model

    def new_machine(self):
        shutil.rmtree(self.models)
        return self


@pytest.fixture
def copies(tmp_path, base):
    return Copies(tmp_path, base)


@pytest.fixture
def told():
    with structlog.testing.capture_logs() as events:
        yield events


def warnings(told):
    return [event["event"] for event in told if event["log_level"] == "warning"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def contents_under_way(folder):
    """Without what a writer is about to put in place of a file: that is no file of the copy, and soon gone."""
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*") if path.name != MANIFEST}


def test_what_was_kept_is_found_with_all_that_is_small_of_the_base(copies, told):
    assert copies.found() is None
    copies.keep()
    model = copies.found()

    assert contents(model.folder) == {**SMALL, **FILES}
    assert (model.identity, model.quantised, model.licence) == (IDENTITY, True, "apache-2.0")
    assert model.bytes == sum(map(len, {**SMALL, **FILES}.values()))
    assert warnings(told) == []


@pytest.mark.parametrize(
    "other",
    [
        {"identity": BaseModelIdentity(source="owner/name", revision="1" * 40)},
        {"identity": BaseModelIdentity(source="owner/other", revision="0" * 40)},
        {"form": FORM | {"device": "NVIDIA H200"}},
        {"form": FORM | {"bitsandbytes": "0.51"}},
    ],
)
def test_another_base_or_another_form_has_a_copy_of_its_own(copies, other):
    copies.keep()

    assert copies.found(**other) is None
    copies.keep(files=FILES | {"model-00001.safetensors": b"other"}, **other)
    assert (copies.found(**other).folder / "model-00001.safetensors").read_bytes() == b"other"
    assert contents(copies.found().folder) == {**SMALL, **FILES}


def test_a_base_in_a_folder_is_known_by_its_content_wherever_it_stands(copies):
    here, there, other = (
        BaseModelIdentity(source=source, revision=revision * 64)
        for source, revision in (("/data/base", "a"), ("file:///scratch/base", "a"), ("/data/base", "b"))
    )
    copies.keep(identity=here)

    assert copies.found(identity=there) is not None
    assert copies.found(identity=other) is None


def killed_while_writing(copies):
    """After the first file of weights; what stands then is what a killed process leaves."""

    def killed():
        raise SystemExit

    with pytest.raises(SystemExit):
        copies.keep(files={**FILES, "model-00002.safetensors": killed})


def test_a_copy_that_was_not_finished_is_none_and_the_next_one_takes_its_place(copies, told):
    killed_while_writing(copies)
    assert (copies.copy().folder / "model-00001.safetensors").exists()
    (copies.copy().folder / ".incoming-0123456789abcdef").write_bytes(b"of a killed writer")

    assert copies.found() is None
    assert warnings(told) == []
    copies.keep()
    assert contents(copies.found().folder) == {**SMALL, **FILES}


def flip(path):
    """One bit, which no size tells."""
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["model-00002.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_copy_is_told_dropped_and_made_anew(copies, told, damage, name):
    damage(copies.keep().folder / name)

    assert copies.found() is None
    assert warnings(told) == ["quantised_copy_damaged"]
    assert copies.found() is None
    assert len(warnings(told)) == 1  # it is gone
    copies.keep()
    assert contents(copies.found().folder) == {**SMALL, **FILES}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"files": {}}',
        lambda m: m | {"base": {}},
        lambda m: m | {"files": {"../outside": m["files"]["config.json"]}},
        lambda m: m | {"files": {"a/../../outside": m["files"]["config.json"]}},
        lambda m: m | {"files": {"config.json": {"size": -1, "sha256": "0" * 64}}},
    ],
)
def test_a_manifest_that_is_not_ours_is_no_copy(copies, told, content):
    """Also where it comes from a bucket: no name in it leads out of the folder."""
    folder = copies.keep(store=copies.store).folder
    if callable(content):
        content = json.dumps(content(json.loads((folder / MANIFEST).read_bytes()))).encode()
    (folder / MANIFEST).write_bytes(content)
    assert copies.found() is None
    copies.store.write(f"{folder.name}/{MANIFEST}", content)

    assert copies.new_machine().found(store=copies.store) is None
    assert set(warnings(told)) == {"quantised_copy_failed"}
    assert not (folder.parent.parent / "outside").exists()


def test_another_machine_finds_it_in_the_store_and_has_it_then(copies, told):
    copies.keep(store=copies.store)
    copies.new_machine()
    assert copies.found() is None

    small = copies.copy(store=copies.store).find()
    assert {path.name for path in small.iterdir()} == {*SMALL, "model.safetensors.index.json"}
    assert contents(copies.found(store=copies.store).folder) == {**SMALL, **FILES}
    assert contents(copies.found().folder) == {**SMALL, **FILES}
    assert warnings(told) == []


def test_a_file_that_is_damaged_here_comes_again_from_the_store(copies, told):
    flip(copies.keep(store=copies.store).folder / "model-00001.safetensors")

    assert contents(copies.found(store=copies.store).folder) == {**SMALL, **FILES}
    assert warnings(told) == ["quantised_copy_damaged"]
    assert contents(copies.found().folder) == {**SMALL, **FILES}


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_what_is_damaged_in_the_store_is_told_and_put_there_again(copies, told, damage):
    folder = copies.keep(store=copies.store).folder
    damage(Path(copies.store.uri.removeprefix("file://")) / folder.name / "model-00002.safetensors")

    assert copies.new_machine().found(store=copies.store) is None
    assert warnings(told) == ["quantised_copy_failed"]
    copies.keep(store=copies.store)
    assert contents(copies.new_machine().found(store=copies.store).folder) == {**SMALL, **FILES}


class Away(DirectoryStore):
    def read(self, key, *, max_bytes=0):
        raise UnavailableError("the store does not answer")

    def upload(self, path, key, **_options):
        raise UnavailableError("the store does not answer")


def test_a_store_that_is_away_costs_a_warning(copies, tmp_path, told):
    away = Away(tmp_path / "away")

    assert copies.found(store=away) is None
    copies.keep(store=away)
    assert warnings(told) == ["quantised_copy_failed"] * 2
    assert copies.found(store=away) is not None  # the one here


def test_a_disk_that_gets_full_costs_a_warning_and_gets_its_room_back(copies, told):
    with largest_file(4000):
        copies.keep()

    assert warnings(told) == ["quantised_copy_failed"]
    assert not copies.copy().folder.exists()
    assert copies.found() is None


def test_a_copy_that_would_leave_no_room_for_the_run_is_not_begun(copies, told):
    free = shutil.disk_usage(copies.base).free
    copies.keep(needed_bytes=free // 2 + 2**40)

    assert warnings(told) == ["quantised_copy_failed"]
    assert copies.found() is None


def test_a_folder_that_cannot_be_made_costs_a_warning(copies, told):
    copies.models.write_text("a file stands where the folder should")

    assert copies.found() is None
    copies.keep()
    assert warnings(told) == ["quantised_copy_failed"]


def test_a_request_to_stop_is_heard_between_two_files_and_leaves_no_copy(copies):
    asked = iter([False, False])
    with pytest.raises(StopRequestedError):
        copies.keep(should_stop=lambda: next(asked, True))

    assert copies.found() is None


def test_a_request_to_stop_is_heard_while_a_copy_is_verified(copies):
    copies.keep()
    with pytest.raises(StopRequestedError):
        copies.found(should_stop=lambda: True)
    assert copies.found() is not None


def test_two_that_make_the_same_copy_at_once_leave_a_whole_one_and_show_no_half_one(copies):
    """Writers that take each file at the same moment, and a reader that looks all the time."""
    together = {name: threading.Barrier(2) for name in FILES}
    seen, over = [], threading.Event()

    def made(name):
        together[name].wait()
        return FILES[name]

    files = {name: partial(made, name) for name in FILES}

    def look():
        while not over.is_set():
            model = copies.found()
            seen.append(None if model is None else contents_under_way(model.folder))

    writers = [threading.Thread(target=lambda: copies.keep(files=files, store=copies.store)) for _ in range(2)]
    reader = threading.Thread(target=look)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    reader.join()

    assert [found for found in seen if found not in (None, {**SMALL, **FILES})] == []
    assert contents(copies.found().folder) == {**SMALL, **FILES}
    assert contents(copies.new_machine().found(store=copies.store).folder) == {**SMALL, **FILES}


def test_of_one_base_the_three_copies_used_last_stay(copies):
    """On one machine: kinds of GPU, and versions of the libraries, come and go."""
    other = BaseModelIdentity(source="owner/other", revision="0" * 40)
    copies.keep(identity=other)
    forms = [FORM | {"bitsandbytes": str(n)} for n in range(4)]
    for age, form in enumerate(forms[:3]):
        folder = copies.keep(form=form).folder
        os.utime(folder / MANIFEST, (1000 + age, 1000 + age))
    assert copies.found(form=forms[0]) is not None  # it is used, and so the newest
    copies.keep(form=forms[3])

    assert [copies.found(form=form) is not None for form in forms] == [True, False, True, True]
    assert copies.found(identity=other) is not None
