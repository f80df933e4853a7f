"""Every kind of store keeps the contract; S3 also under the faults that networks and stores have."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from faults import NO_FAULT, Fault
from servers import KINDS, Place, S3Server, free_port, new_bucket, serve
from store_contract import QUICK, SETTINGS, StoreContract, left_behind, never, sha

from job.core.errors import (
    DataError,
    DeniedError,
    LocalDiskError,
    NotFoundError,
    StopRequestedError,
    UnavailableError,
    UsageError,
)
from job.edge.store.directory import store_trouble
from job.edge.store.lanes import Lanes
from job.edge.store.listing import expand
from job.edge.store.objects import PreconditionError, StoreSettings
from job.edge.store.opening import open_store, store_and_key
from job.edge.store.patience import Patience
from job.edge.store.probing import probe
from job.edge.store.s3_etags import Etags, content_md5

MIB = 1024 * 1024
IMPORTS = (
    "from job.edge.store.objects import PreconditionError, StoreSettings; from job.edge.store.opening import open_store"
)
"""Of the scripts that run in processes of their own."""


class TestEveryStore(StoreContract):
    @pytest.fixture(params=["file", *KINDS])
    def place(self, request, tmp_path_factory, s3_environment):
        if request.param == "file":
            return Place(root=f"file://{tmp_path_factory.mktemp('store')}/some where/runs", server=None)
        server = request.getfixturevalue(request.param.replace("-", "_"))
        s3_environment(server)
        return new_bucket(server)


def opened(place, *, settings=SETTINGS, patience=QUICK, part_bytes=5 * MIB):
    return open_store(place.root, settings, patience=patience, part_bytes=part_bytes)


def put_behind(place, key, data):
    place.server.client().put_object(Bucket=place.bucket, Key=f"some where/runs/{key}", Body=data)


def first(faults, *, method, part=""):
    """A rule: the first requests of a method get these faults, one each."""
    waiting = list(faults)

    def rule(request):
        return waiting.pop(0) if waiting and request.method == method and part in request.path else NO_FAULT

    return rule


# --- URIs


@pytest.mark.parametrize("uri", ["gs://b/k", "http://b/k", "s3://", "s3:///key", "file://host/x", "s3://b!/k", ""])
def test_a_uri_of_no_known_store_is_a_usage_error(uri):
    with pytest.raises(UsageError):
        open_store(uri, SETTINGS)


@pytest.mark.parametrize("uri", ["s3://KEY:s3cr3t@bucket/x", "s3://KEY@bucket/s3cr3t"])
def test_credentials_in_a_uri_are_refused_without_repeating_them(uri):
    with pytest.raises(UsageError, match="credentials do not belong") as caught:
        open_store(uri, SETTINGS)
    assert "s3cr3t" not in str(caught.value)


def test_a_uri_splits_into_root_and_key():
    assert store_and_key("s3://bucket/a/b c+.jsonl") == ("s3://bucket", "a/b c+.jsonl")
    assert store_and_key("file:///d/a/x.jsonl") == ("file:///d/a", "x.jsonl")
    with pytest.raises(UsageError):
        store_and_key("s3://bucket/a/")


def test_a_bare_path_is_a_store_and_a_data_uri(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_store("data", SETTINGS).write("1.jsonl", b"{}")

    assert [one.uri for one in expand(["data/*.jsonl"], SETTINGS, should_stop=never)] == [
        f"file://{tmp_path}/data/1.jsonl"
    ]


# --- S3: listing, settings, errors


def test_a_listing_goes_on_beyond_a_thousand_keys(moto_place):
    store = opened(moto_place)
    keys = [f"many/{number:04d}.jsonl" for number in range(1005)]
    # Without boto3, which takes longer over so many than the server does.
    with contextlib.closing(HTTPConnection(urlsplit(moto_place.server.endpoint).netloc)) as connection:
        for key in keys:
            connection.request("PUT", f"/{moto_place.bucket}/{quote(f'some where/runs/{key}')}")
            with connection.getresponse() as answer:
                answer.read()

    assert [entry.key for entry in store.list("many/")] == keys
    assert len(expand([f"{store.uri}/many/*[0-4].jsonl"], SETTINGS, should_stop=never)) == 505
    store.delete(keys)
    assert list(store.list()) == []


def test_markers_of_empty_folders_are_no_objects(moto_place):
    put_behind(moto_place, "data/", b"")
    put_behind(moto_place, "data/1", b"x")

    assert [entry.key for entry in opened(moto_place).list()] == ["data/1"]


def test_a_missing_bucket_is_not_found(moto_place):
    store = open_store(f"s3://no-{uuid.uuid4().hex}/x", SETTINGS, patience=QUICK)
    for call in (lambda: store.stat("k"), lambda: store.write("k", b""), lambda: list(store.list())):
        with pytest.raises(NotFoundError, match="s3://no-"):
            call()


def test_the_kms_key_and_the_checksum_go_with_every_write(faulty_place, proxy, tmp_path):
    (tmp_path / "out").write_bytes(b"x" * (6 * MIB))
    for checksums in (True, False):
        proxy.seen.clear()
        store = opened(faulty_place, settings=StoreSettings(sse_kms_key="key-1", checksums=checksums))
        store.write("small", b"x")
        store.upload(tmp_path / "out", "large", should_stop=never)

        bodies = [r for r in proxy.seen if r.method == "PUT"]
        begin = [r for r in bodies if "uploadId" not in r.path] + [r for r in proxy.seen if r.path.endswith("?uploads")]
        assert {r.headers.get("x-amz-server-side-encryption-aws-kms-key-id") for r in begin} == {"key-1"}
        assert len(begin) == 2
        assert len(bodies) == 3
        assert all(("x-amz-checksum-crc32" in r.headers) is checksums for r in bodies)


def test_a_refusal_is_denied_and_never_not_found(tmp_path_factory, certificates, s3_environment, tmp_path):
    folder = tmp_path_factory.mktemp("strict")
    with serve("moto-http", folder, certificates, extra={"INITIAL_NO_AUTH_ACTION_COUNT": "1"}) as server:
        s3_environment(server)
        place = new_bucket(server)
        store = opened(place)
        for call in (
            lambda: store.stat("k"),
            lambda: store.read("k"),
            lambda: store.write("k", b""),
            lambda: list(store.list()),
            lambda: store.delete(["k"]),
            lambda: store.download("k", tmp_path / "in", should_stop=never),
            lambda: probe(store),
        ):
            with pytest.raises(DeniedError, match=r"InvalidAccessKeyId.*AWS_ACCESS_KEY_ID"):
                call()


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "AccessDenied", "allow it for these credentials"),
        (400, "ExpiredToken", "renew the credentials"),
        (403, "RequestTimeTooSkewed", "clock"),
        (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        (400, "KMS.NotFoundException", "sse_kms_key"),
    ],
)
def test_the_reason_of_a_refusal_is_told_even_where_head_has_no_body(faulty_place, proxy, status, code, advice):
    proxy.rule = lambda _: Fault(status=status, code=code)
    store = opened(faulty_place)
    for call in (lambda: store.stat("k"), lambda: store.write("k", b"", create_only=True), lambda: probe(store)):
        with pytest.raises(DeniedError, match=f"{code}.*{advice}"):
            call()


def test_credentials_that_expire_are_taken_anew_from_where_they_came(faulty_place, proxy, tmp_path, monkeypatch):
    """As from a mounted secret: whoever renews it writes the file again, and boto3 alone would not look."""
    file = tmp_path / "credentials"

    def hand_out(name):
        file.write_text(f"[default]\naws_access_key_id = {name}\naws_secret_access_key = s\naws_session_token = t\n")

    def rule(request):
        if "Credential=old/" not in request.headers["authorization"]:
            return NO_FAULT
        hand_out("new")
        return Fault(status=400, code="ExpiredToken")

    hand_out("old")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    store = opened(faulty_place)
    proxy.rule = rule
    store.write("k", b"x" * 100)
    assert store.read("k")[0] == b"x" * 100
    assert proxy.times("PUT") == 2


@pytest.mark.parametrize("status", [400, 500])
def test_a_head_that_is_refused_once_is_sent_again(faulty_place, proxy, status):
    """It has no body that says why, and the GET that asks for the reason may find none, or another failure."""
    put_behind(faulty_place, "k", b"x" * 100)
    asked = {"HEAD": [Fault(status=400, code="ExpiredToken")], "GET": [Fault(status=status)] if status > 400 else []}
    proxy.rule = lambda request: asked[request.method].pop() if asked[request.method] else NO_FAULT
    assert opened(faulty_place).stat("k").size == 100
    assert proxy.times("HEAD", "runs/k") == 2


def test_a_write_that_another_one_overtook_tells_of_what_stands_there(faulty_place, proxy):
    """Swift answers so: with success, and without an ETag."""
    put_behind(faulty_place, "k", b"theirs")
    proxy.rule = first([Fault(status=200, body="<Done/>")], method="PUT")
    store = opened(faulty_place)
    assert store.write("k", b"ours") == store.read("k")[1]
    assert store.read("k")[0] == b"theirs"


def test_without_credentials_it_says_what_to_set(moto_place, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DeniedError, match="set AWS_ACCESS_KEY_ID"):
        opened(moto_place).stat("k")


def test_an_unknown_certificate_is_told_at_once(moto_https, s3_environment, monkeypatch):
    s3_environment(moto_https)
    monkeypatch.delenv("AWS_CA_BUNDLE")
    with pytest.raises(UsageError, match="AWS_CA_BUNDLE"):
        opened(new_bucket(moto_https), patience=Patience()).stat("k")


def test_a_store_that_is_away_is_unavailable(s3_environment):
    s3_environment(S3Server(endpoint=f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(UnavailableError, match=r"http://127.0.0.1:\d+ failed 4 times"):
        open_store("s3://bucket/x", SETTINGS, patience=QUICK).read("k")


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_store_is_asked_again(faulty_place, proxy, status):
    store = opened(faulty_place)
    proxy.rule = first([Fault(status=status, code="SlowDown")] * 3, method="PUT")
    store.write("k", b"x")

    assert proxy.times("PUT") == 4
    assert store.read("k")[0] == b"x"


def test_retries_do_not_multiply(faulty_place, proxy):
    proxy.rule = lambda _: Fault(status=503, code="SlowDown")
    with pytest.raises(UnavailableError, match=r"503 SlowDown .*look at the endpoint"):
        opened(faulty_place).write("k", b"x")
    assert proxy.times("PUT") == QUICK.attempts


def test_the_time_budget_ends_the_retries(faulty_place, proxy):
    proxy.rule = lambda _: Fault(status=503)
    with pytest.raises(UnavailableError, match="failed 1 times"):
        opened(faulty_place, patience=Patience(budget_seconds=0)).read("k")


# --- S3: conditional writes whose answer is lost


@pytest.mark.parametrize("fault", [Fault(lose_answer=True), Fault(status=409, code="ConditionalRequestConflict")])
def test_a_create_only_write_is_ours_though_its_answer_was_lost(faulty_place, proxy, fault):
    proxy.rule = first([fault], method="PUT")
    store = opened(faulty_place)
    etag = store.write("lock", b"mine", create_only=True)

    assert store.read("lock") == (b"mine", etag)
    assert proxy.times("PUT") == 2


def test_a_swap_is_ours_though_its_answer_was_lost(faulty_place, proxy):
    store = opened(faulty_place)
    etag = store.write("channel", b"old")
    proxy.rule = first([Fault(lose_answer=True)], method="PUT")

    assert store.read("channel")[0] == b"old"
    assert store.write("channel", b"new", if_match=etag) == store.stat("channel").etag
    assert store.read("channel")[0] == b"new"


def test_a_lost_answer_does_not_hide_that_another_one_won(faulty_place, proxy):
    store = opened(faulty_place)
    put_behind(faulty_place, "lock", b"theirs")
    proxy.rule = first([Fault(status=500)], method="PUT")

    with pytest.raises(PreconditionError):
        store.write("lock", b"mine", create_only=True)
    assert store.read("lock")[0] == b"theirs"


def test_a_store_that_compares_etags_letter_by_letter_still_swaps(faulty_place, proxy):
    store = opened(faulty_place)
    etag = store.write("channel", b"old")

    def rule(request):
        quoted = request.headers.get("if-match", "").startswith('"')
        return Fault(status=412, code="PreconditionFailed") if request.method == "PUT" and quoted else NO_FAULT

    proxy.rule = rule
    store.write("channel", b"new", if_match=etag)
    with pytest.raises(PreconditionError):
        store.write("channel", b"newer", if_match=etag)
    assert store.read("channel")[0] == b"new"


def test_a_probe_tells_of_conditions_that_are_refused(faulty_place, proxy):
    def rule(request):
        conditional = {"if-none-match", "if-match"} & set(request.headers)
        return Fault(status=501, code="NotImplemented") if request.method == "PUT" and conditional else NO_FAULT

    proxy.rule = rule
    found = probe(opened(faulty_place))
    assert not found.conditional
    assert "NotImplemented" in found.reason
    assert found.deletes


def test_a_probe_tells_that_deleting_is_denied(faulty_place, proxy):
    proxy.rule = first([Fault(status=403, code="AccessDenied")], method="POST", part="delete")
    found = probe(opened(faulty_place))
    assert (found.conditional, found.deletes) == (True, False)
    assert "AccessDenied" in found.reason


@pytest.mark.parametrize(
    ("code", "kind"), [("AccessDenied", DeniedError), ("InternalError", UnavailableError), ("NoSuchKey", None)]
)
def test_a_key_that_cannot_be_deleted_is_told_though_the_request_succeeds(faulty_place, proxy, code, kind):
    refused = f"<DeleteResult><Error><Key>k</Key><Code>{code}</Code><Message>m</Message></Error></DeleteResult>"
    proxy.rule = lambda _: Fault(status=200, body=refused)
    with pytest.raises(kind, match=code) if kind else contextlib.nullcontext():
        opened(faulty_place).delete(["k"])


def test_an_upload_that_the_store_forgot_is_not_taken_for_a_success(faulty_place, proxy, tmp_path):
    (tmp_path / "out").write_bytes(b"x" * (6 * MIB))
    proxy.rule = first([Fault(status=404, code="NoSuchUpload")], method="POST", part="uploadId")
    with pytest.raises(NotFoundError, match="NoSuchUpload"):
        opened(faulty_place).upload(tmp_path / "out", "data", should_stop=never)


# --- S3: transfers under faults


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


def test_an_etag_that_only_looks_like_an_md5_is_no_obstacle():
    etags = Etags()
    assert [etags.is_wrong(expected="a", found="b") for _ in range(3)] == [True, True, False]
    assert not etags.is_wrong(expected="c", found="d")
    trusted = Etags()
    assert not trusted.is_wrong(expected="a", found="a")
    assert [trusted.is_wrong(expected="a", found="b") for _ in range(9)] == [True] * 9


@pytest.mark.parametrize(
    ("answer", "md5"),
    [
        ({"ETag": f'"{"a1" * 16}"'}, "a1" * 16),
        ({"ETag": f'"{"a1" * 16}"', "ServerSideEncryption": "AES256"}, "a1" * 16),
        ({"ETag": f'"{"a1" * 16}-3"'}, None),
        ({"ETag": f'"{"a1" * 16}"', "ServerSideEncryption": "aws:kms:dsse"}, None),
        ({"ETag": f'"{"a1" * 16}"', "SSECustomerAlgorithm": "AES256"}, None),
    ],
)
def test_an_etag_is_the_md5_unless_parts_or_a_key_made_it(answer, md5):
    assert content_md5(answer) == md5


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


# --- file://


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


def test_a_folder_needs_no_boto3(tmp_path):
    script = f"{IMPORTS}; import sys; open_store('x', StoreSettings()); print('boto3' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"


def test_two_processes_swap_a_file_and_one_wins(tmp_path):
    etag = open_store(str(tmp_path), SETTINGS).write("channel", b"old")
    script = (
        f"{IMPORTS}; import sys\n"
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
