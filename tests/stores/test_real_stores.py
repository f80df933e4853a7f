"""The contract on a real Ceph and a real Swift: they check signatures and checksums, and are nobody's mocks."""

import uuid
from dataclasses import replace

import pytest
from store_contract import QUICK, SETTINGS, PlainStoreContract, StoreContract, never, sha

from job.core.errors import DeniedError, NotFoundError, UsageError
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.edge.store.probing import probe

pytestmark = pytest.mark.stores

MIB = 1024 * 1024
REFUSED = {
    "Ceph": {"secret": "SignatureDoesNotMatch", "access": "InvalidAccessKeyId"},
    "Swift": {"secret": "SignatureDoesNotMatch", "access": "SignatureDoesNotMatch"},  # one answer for both
}


class EveryRealStore:
    """What mocks do not do."""

    def test_a_store_without_checksums_keeps_working(self, place, tmp_path):
        (tmp_path / "out").write_bytes(b"x" * (6 * MIB))
        store = open_store(place.root, StoreSettings(checksums=False), patience=QUICK, part_bytes=place.part_bytes)
        sent = store.upload(tmp_path / "out", "large", should_stop=never)
        store.download("large", tmp_path / "in", sha256=sent.sha256, should_stop=never)
        assert sent.sha256 == sha(b"x" * (6 * MIB))
        probe(store)  # which deletes

    @pytest.mark.parametrize("name", ["secret", "access"])
    def test_wrong_credentials_are_denied_with_the_reason(self, place, s3_environment, name):
        s3_environment(replace(place.server, **{name: "WRONG"}))
        store = open_store(place.root, SETTINGS, patience=QUICK)
        for call in (lambda: store.stat("k"), lambda: store.write("k", b""), lambda: list(store.list())):
            with pytest.raises(DeniedError, match=self.refused[name]):
                call()

    def test_a_missing_bucket_is_not_found(self, place):
        with pytest.raises(NotFoundError):
            open_store(f"s3://no-{uuid.uuid4().hex}/x", SETTINGS, patience=QUICK).write("k", b"")

    def test_parts_that_a_killed_upload_left_are_cleared_and_no_others(self, place):
        client, store = place.server.client(), open_store(place.root, SETTINGS, patience=QUICK)
        for key in ("some where/runs/runs/r1/adapter/a", "some where/runs/runs/r1/b", "some where/runs/runs/r2/c"):
            upload = client.create_multipart_upload(Bucket=place.bucket, Key=key)["UploadId"]
            client.upload_part(Bucket=place.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 100)
        assert store.clear_unfinished("runs/r1/") == 2
        (left,) = client.list_multipart_uploads(Bucket=place.bucket)["Uploads"]
        assert left["Key"] == "some where/runs/runs/r2/c"


class TestCeph(EveryRealStore, StoreContract):
    """Checksums on, as by default: over https they must not go as trailers, which this gateway answers with 411."""

    refused = REFUSED["Ceph"]

    @pytest.fixture
    def place(self, ceph_place):
        return ceph_place


class TestSwift(EveryRealStore, PlainStoreContract):
    refused = REFUSED["Swift"]

    @pytest.fixture
    def place(self, swift_place):
        return swift_place

    def test_a_swap_is_refused_and_not_done_blindly(self, store):
        etag = store.write("channel", b"1")
        for condition in (etag, "0" * len(etag)):
            with pytest.raises(UsageError, match="501 NotImplemented"):
                store.write("channel", b"2", if_match=condition)
        assert store.read("channel")[0] == b"1"

    def test_the_probe_finds_what_is_missing_and_leaves_nothing(self, store):
        found = probe(store)

        assert not found.conditional
        assert "If-Match" in found.reason
        assert list(store.list()) == []
