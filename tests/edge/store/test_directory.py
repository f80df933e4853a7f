"""A folder as a store: what the system's errors mean, several writers at once, links, and what deleting leaves."""

import errno
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_contract import SETTINGS, never

from job.core.errors import DeniedError, LocalDiskError, NotFoundError, UnavailableError
from job.edge.store.directory import store_trouble
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, NotFoundError),
        (errno.EACCES, DeniedError),
        (errno.EROFS, LocalDiskError),
        (errno.ENOSPC, LocalDiskError),
        (errno.ESTALE, UnavailableError),
    ],
)
def test_a_folder_says_what_the_system_says(number, kind):
    trouble = store_trouble(OSError(number, os.strerror(number)), Path("/mnt/models/run.json"))
    assert type(trouble) is kind
    assert f"file:///mnt/models/run.json: {os.strerror(number)}; " in str(trouble)


def test_two_processes_swap_a_file_and_one_wins(tmp_path):
    etag = open_store(str(tmp_path), SETTINGS).write("channel", b"old")
    script = (
        "import sys; from job.edge.store.objects import *; from job.edge.store.opening import open_store\n"
        "store = open_store(sys.argv[1], StoreSettings()); sys.stdin.readline()\n"
        "try: store.write('channel', sys.argv[3].encode(), if_match=sys.argv[2]); print('won')\n"
        "except PreconditionError: print('lost')"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), etag, str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert sorted(racer.communicate()[0].strip() for racer in racers) == ["lost", "lost", "won"]


def test_a_writer_that_is_frozen_does_not_hold_up_the_others_for_ever(tmp_path, monkeypatch):
    store = open_store(f"file://{tmp_path}", StoreSettings())
    monkeypatch.setattr("job.edge.store.directory._PATIENCE_SECONDS", 0.05)
    with (tmp_path / ".store-lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UnavailableError, match="is it frozen"):
            store.write("a", b"1")
    store.write("a", b"2")
    assert store.read("a")[0] == b"2"


def test_deleting_takes_empty_folders_and_dead_writers_files_with_it(tmp_path):
    store = open_store(str(tmp_path / "store"), SETTINGS)
    for key in ("run/checkpoints/a/1", "run/checkpoints/a/2", "run/run.json"):
        store.write(key, b"x")
    (tmp_path / "store/run/checkpoints/a/.incoming-0123").write_bytes(b"half")

    assert len(list(store.list())) == 3
    store.delete(["run/checkpoints/a/1", "run/checkpoints/a/2"])
    assert [path.name for path in (tmp_path / "store/run").iterdir()] == ["run.json"]


def test_a_folder_survives_deletion_while_another_thread_writes_there(tmp_path):
    store = open_store(str(tmp_path / "store"), SETTINGS)
    (tmp_path / "out").write_bytes(b"x" * 1000)

    def churn(name):
        for _ in range(40):
            store.upload(tmp_path / "out", f"a/b/{name}", should_stop=never)
            store.delete([f"a/b/{name}"])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, "wxyz"))
    assert list(store.list()) == []


def test_a_listing_follows_links_but_not_in_circles(tmp_path):
    (tmp_path / "store/sub").mkdir(parents=True)
    (tmp_path / "store/sub/1").write_bytes(b"x")
    (tmp_path / "store/sub/up").symlink_to(tmp_path / "store")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/2").write_bytes(b"xy")
    (tmp_path / "store/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "store/broken").symlink_to(tmp_path / "nowhere")

    assert [entry.key for entry in open_store(str(tmp_path / "store"), SETTINGS).list()] == ["out/2", "sub/1"]


def test_a_folder_is_not_an_object(tmp_path):
    store = open_store(str(tmp_path), SETTINGS)
    store.write("folder/file", b"x")
    for call in (lambda: store.stat("folder"), lambda: store.read("folder"), lambda: store.stat("folder/file/deeper")):
        with pytest.raises(NotFoundError):
            call()
