"""Large objects arrive whole, or not at all, under the faults that networks and stores have."""

import os
import subprocess
import sys
import threading

import pytest
from faults import NO_FAULT, Fault
from store_contract import left_behind, never, sha
from store_places import MIB, first, opened, put_behind

from job.core.errors import DataError, LocalDiskError, StopRequestedError, UnavailableError
from job.edge.store.lanes import Lanes


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut_after_bytes=1000),
        Fault(cut_after_bytes=300_000, reset=True),
        Fault(cut_after_bytes=0),
        Fault(shorten_to_bytes=1000),
        Fault(lose_answer=True),
        Fault(status=503, code="SlowDown"),
    ],
)
def test_a_cut_part_is_fetched_again_and_only_it(faulty_place, proxy, tmp_path, fault):
    data = bytes(range(256)) * 4096 * 4
    put_behind(faulty_place, "data", data)
    proxy.rule = first([fault, fault], method="GET")

    got = opened(faulty_place, part_bytes=MIB).download("data", tmp_path / "in", sha256=sha(data), should_stop=never)

    assert (tmp_path / "in").read_bytes() == data
    assert got.sha256 == sha(data)
    assert proxy.times("GET") == 4 + 2


def test_a_download_of_a_store_that_always_cuts_is_unavailable(faulty_place, proxy, tmp_path):
    put_behind(faulty_place, "data", b"x" * MIB)
    proxy.rule = lambda request: Fault(cut_after_bytes=1000) if request.method == "GET" else NO_FAULT
    with pytest.raises(UnavailableError):
        opened(faulty_place).download("data", tmp_path / "in", should_stop=never)
    assert left_behind(tmp_path) == []


def test_an_object_that_changes_while_it_is_read_is_never_mixed(faulty_place, proxy, tmp_path):
    put_behind(faulty_place, "data", b"a" * (4 * MIB))
    changed = threading.Event()

    def rule(request):
        if request.method == "GET" and "bytes=2097152-" in request.headers.get("range", "") and not changed.is_set():
            changed.set()
            put_behind(faulty_place, "data", b"b" * (4 * MIB))
        return NO_FAULT

    proxy.rule = rule
    with pytest.raises(DataError, match="changed while it was being read"):
        opened(faulty_place, part_bytes=MIB).download("data", tmp_path / "in", should_stop=never)
    assert changed.is_set()
    assert all(request.headers.get("if-match") for request in proxy.seen if request.method == "GET")
    assert left_behind(tmp_path) == []


def test_bytes_damaged_on_the_way_are_fetched_once_more(faulty_place, proxy, tmp_path):
    data = b"x" * (2 * MIB)
    put_behind(faulty_place, "data", data)
    proxy.rule = first([Fault(flip_byte=True)], method="GET")
    opened(faulty_place, part_bytes=MIB).download("data", tmp_path / "in", sha256=sha(data), should_stop=never)
    assert (tmp_path / "in").read_bytes() == data

    proxy.rule = lambda request: Fault(flip_byte=True)
    with pytest.raises(DataError, match="3 times"):
        opened(faulty_place, part_bytes=MIB).download("data", tmp_path / "in", sha256=sha(data), should_stop=never)
    assert (tmp_path / "in").read_bytes() == data


@pytest.mark.parametrize("part_bytes", [MIB, 5 * MIB])
def test_damaged_bytes_show_by_the_etag_where_nothing_else_is_known(faulty_place, proxy, tmp_path, part_bytes):
    """In one request or in parts; put by a client that sends no checksum, as data often is."""
    data = os.urandom(2 * MIB)
    put_behind(faulty_place, "data", data)
    proxy.rule = first([Fault(flip_byte=True)] * 2, method="GET")
    store = opened(faulty_place, part_bytes=part_bytes)
    store.download("data", tmp_path / "in", should_stop=never)
    assert (tmp_path / "in").read_bytes() == data

    proxy.rule = lambda request: Fault(flip_byte=True)
    with pytest.raises(DataError, match="MD5"):
        store.download("data", tmp_path / "in", should_stop=never)
    proxy.rule = first([Fault(flip_byte=True)], method="GET")
    put_behind(faulty_place, "small", b"[1, 2]")
    assert store.read("small")[0] == b"[1, 2]"


def test_a_stop_ends_a_trickling_download(faulty_place, proxy, tmp_path):
    put_behind(faulty_place, "data", b"x" * (2 * MIB))
    proxy.rule = lambda request: Fault(trickle_seconds=0.05 if request.method == "GET" else 0)
    with pytest.raises(StopRequestedError):
        opened(faulty_place, part_bytes=MIB).download(
            "data", tmp_path / "in", should_stop=lambda: proxy.times("GET") > 0
        )
    assert left_behind(tmp_path) == []


def test_a_failed_part_is_sent_again_and_the_answer_to_the_last_request_may_be_lost(faulty_place, proxy, tmp_path):
    data = bytes(range(256)) * (4096 * 12)
    (tmp_path / "out").write_bytes(data)
    faults = {"PUT": [Fault(status=500), Fault(lose_answer=True)], "POST": [NO_FAULT, Fault(lose_answer=True)]}
    # Some stores forget an upload as soon as it is completed.
    faults["POST"].append(Fault(status=404, code="NoSuchUpload"))

    def rule(request):
        waiting = faults.get(request.method)
        return waiting.pop(0) if waiting else NO_FAULT

    proxy.rule = rule
    store = opened(faulty_place)
    sent = store.upload(tmp_path / "out", "data", should_stop=never)

    assert sent.sha256 == sha(data)
    assert store.download("data", tmp_path / "in", should_stop=never).sha256 == sha(data)


@pytest.mark.parametrize("stopped", [True, False])
def test_an_upload_that_fails_leaves_no_invisible_parts(faulty_place, proxy, tmp_path, stopped):
    (tmp_path / "out").write_bytes(b"x" * (12 * MIB))
    if not stopped:
        proxy.rule = lambda request: Fault(status=500) if "partNumber=2" in request.path else NO_FAULT
    with pytest.raises(StopRequestedError if stopped else UnavailableError):
        opened(faulty_place).upload(
            tmp_path / "out", "data", should_stop=lambda: stopped and proxy.times("PUT", "partNumber") > 0
        )

    assert proxy.times("DELETE", "uploadId") >= 1
    assert not faulty_place.server.client().list_multipart_uploads(Bucket=faulty_place.bucket).get("Uploads")


def test_a_local_file_that_cannot_be_read_is_a_local_error(moto_place, tmp_path):
    with pytest.raises(LocalDiskError, match="gone"):
        opened(moto_place).upload(tmp_path / "gone", "data", should_stop=never)


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from job.edge.store.objects import StoreSettings; from job.edge.store.opening import open_store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = open_store(sys.argv[1], StoreSettings(), part_bytes=1 << 20)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 19, 3 << 19))
store.download("data", Path(sys.argv[2]), should_stop=lambda: False)
"""


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_a_full_local_disk_is_told_and_left_clean(moto_place, tmp_path, kind):
    put_behind(moto_place, "data", b"x" * (4 * MIB))
    (tmp_path / "store").mkdir()
    (tmp_path / "store/data").write_bytes(b"x" * (4 * MIB))
    root = moto_place.root if kind == "s3" else str(tmp_path / "store")

    target = tmp_path / "work/in"
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, root, str(target)], capture_output=True, text=True, check=False
    )

    assert f"LocalDiskError: {target}: File too large" in done.stderr
    assert left_behind(tmp_path / "work") == []


def test_a_download_that_brings_nothing_for_too_long_is_unavailable():
    with (
        pytest.raises(UnavailableError, match="nothing arrived"),
        Lanes("reading s3://bucket/key", never, silence_seconds=0.2) as lanes,
    ):
        lanes.run(lambda: lanes.cancelled.wait(30))


def test_a_store_that_ignores_ranges_is_not_taken_for_the_object(faulty_place, proxy, tmp_path, monkeypatch):
    put_behind(faulty_place, "data", b"x" * (2 * MIB))
    proxy.rule = lambda request: Fault(drop_header="range")
    with pytest.raises(DataError):
        opened(faulty_place, part_bytes=MIB).download("data", tmp_path / "in", should_stop=never)
    assert left_behind(tmp_path) == []
