"""Every kind of store keeps the contract; S3 also when it refuses, is away, or loses an answer."""

import contextlib
import uuid

import pytest
from botocore.exceptions import ClientError
from faults import NO_FAULT, Fault
from servers import KINDS, Place, S3Server, free_port, new_bucket, serve
from store_contract import QUICK, SETTINGS, StoreContract, never
from store_places import MIB, first, opened, put_behind

from job.core.errors import DeniedError, LocalDiskError, NotFoundError, UnavailableError, UsageError
from job.edge.store.objects import PreconditionError, StoreSettings
from job.edge.store.opening import open_store
from job.edge.store.patience import Patience
from job.edge.store.probing import probe
from job.edge.store.s3.errors import summary


class TestEveryStore(StoreContract):
    @pytest.fixture(params=["file", *KINDS])
    def place(self, request, tmp_path_factory, s3_environment):
        if request.param == "file":
            return Place(root=f"file://{tmp_path_factory.mktemp('store')}/some where/runs", server=None)
        server = request.getfixturevalue(request.param.replace("-", "_"))
        s3_environment(server)
        return new_bucket(server)


# --- S3: settings and errors


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


@pytest.mark.parametrize(("status", "code"), [(403, "QuotaExceeded"), (507, "InsufficientStorage"), (507, "")])
def test_a_store_without_room_is_not_denied_and_not_asked_again(faulty_place, proxy, tmp_path, status, code):
    proxy.rule = lambda request: Fault(status=status, code=code) if request.method == "PUT" else NO_FAULT
    (tmp_path / "out").write_bytes(b"x")
    store = opened(faulty_place)
    for call in (lambda: store.write("k", b""), lambda: store.upload(tmp_path / "out", "k", should_stop=never)):
        before = proxy.times("PUT")
        with pytest.raises(LocalDiskError, match="the store has no room; raise the store's quota"):
            call()
        assert proxy.times("PUT") == before + 1


def test_what_a_store_says_is_one_line_and_not_a_page():
    error = ClientError({"Error": {"Code": "X", "Message": "a\n\nb " + "c" * 9999}, "ResponseMetadata": {}}, "Get")

    assert "a b ccc" in summary(error)
    assert "\n" not in summary(error)
    assert len(summary(error)) < 400


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
