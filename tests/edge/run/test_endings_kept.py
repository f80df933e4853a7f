"""Endings in every kind of store: created once, bounded in number, and whatever else stands there is passed over."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from job.core.attempt.ended import Ended, ended_without_a_word
from job.edge.run import endings
from job.edge.run.artifacts import finished_runs, runs_of
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store


@pytest.fixture(params=["directory", "moto", "ministack"])
def store(request, tmp_path):
    if request.param == "directory":
        return open_store(f"file://{tmp_path}/store", StoreSettings())
    return open_store(request.getfixturevalue(f"{request.param}_place").root, StoreSettings())


def an_ending(number=0, **facts):
    moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
    known = {"code": 65, "again": "no", "reason": f"reason {number}", "action": "a", "host": "h"}
    return Ended(time=moment.isoformat(timespec="seconds"), **known | facts)


def test_an_ending_is_read_as_it_was_left_and_is_no_run(store):
    known = an_ending(run_uri="s3://b/runs/r", attempt=3, step=7, last_committed_step=6, signal="SIGTERM")
    silent = ended_without_a_word({"number": 2, "host": 7}, run_uri="s3://b/runs/r", found=known.time, newest_step=4)
    keys = [endings.leave(store, each) for each in (known, silent)]

    assert {each.code: each for each in endings.last(store, at_most=9)} == {65: known, None: silent}
    assert json.loads(store.read(keys[1])[0])["code"] is None
    assert [key.rpartition("-")[0] for key in keys] == [
        "endings/20260101T000000Z-65",
        "endings/20260101T000000Z-none",
    ]
    assert ([*runs_of(store, "")], finished_runs(store)) == ([], [])


def test_only_the_newest_stay(store):
    for number in range(endings.KEPT + 7):
        endings.leave(store, an_ending(number))

    found = endings.last(store, at_most=1000)
    assert [ended.reason for ended in found] == [f"reason {n}" for n in reversed(range(7, endings.KEPT + 7))]
    assert len(endings.last(store, at_most=3)) == 3


@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"[1]", b'{"code": "x"}', b'{"time": 1}', b"\xff", b"[" * 60_000, b'"' + b"x" * 200_000 + b'"'],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_ending_of_ours_is_passed_over(store, garbage):
    endings.leave(store, an_ending(1))
    store.write("endings/20271231T000000Z-65-00000000.json", garbage)
    store.write("endings/notes.txt", b"of a person")

    assert [ended.reason for ended in endings.last(store, at_most=9)] == ["reason 1"]
