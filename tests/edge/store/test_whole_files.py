"""Files appear whole or not at all, whoever clears up beside them."""

import fcntl
from pathlib import Path

import pytest

from job.edge.store.whole_files import TEMPORARY, remove_dead, whole_file


@pytest.mark.parametrize("holds_the_lock", [False, True])
def test_a_file_that_is_taken_for_dead_as_it_is_begun_is_begun_again(tmp_path, monkeypatch, holds_the_lock):
    """Another process clears up between its opening and its lock, or has just begun to."""
    lock, cleared = fcntl.flock, []

    def lock_late(file, how):
        if not cleared:
            cleared.append(file)
            if holds_the_lock:
                with Path(file.name).open("rb") as other:
                    lock(other, how)
                    try:
                        lock(file, how)  # is refused
                    finally:
                        Path(file.name).unlink()
            assert remove_dead(tmp_path) == 1
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with whole_file(tmp_path / "file") as file:
        file.write(b"all of it")

    assert len(cleared) == 1
    assert (tmp_path / "file").read_bytes() == b"all of it"


def test_only_files_whose_writers_died_are_cleared_up(tmp_path):
    dead = tmp_path / f"{TEMPORARY}0123"
    dead.write_bytes(b"half")
    with whole_file(tmp_path / "file") as file:
        file.write(b"half")
        assert remove_dead(tmp_path) == 1
        file.write(b" and half")

    assert (tmp_path / "file").read_bytes() == b"half and half"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
