"""The contract on a real Ceph object store: it checks signatures, refuses checksum trailers, and is nobody's mock."""

import shutil
import subprocess
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from servers import S3Server, free_port, new_bucket
from store_contract import QUICK, SETTINGS, StoreContract, never

from job.core.errors import DeniedError, NotFoundError
from job.edge.storage import StoreSettings, open_store, probe

pytestmark = pytest.mark.stores

HERE = Path(__file__).parent
ACCESS, SECRET = "AKIATEST", "test-secret"


@pytest.fixture(scope="session")
def ceph(tmp_path_factory, certificates):
    """Its address over http and over https."""
    if shutil.which("radosgw") is None:
        pytest.fail(f"there is no Ceph on this machine; run {HERE / 'install.sh'} as root")
    folder = tmp_path_factory.mktemp("ceph")
    http, https, monitor = free_port(), free_port(), free_port()
    arguments = [folder, http, https, monitor, certificates.certificate, certificates.key, ACCESS, SECRET]
    try:
        subprocess.run([HERE / "ceph_up.sh", *map(str, arguments)], check=True, timeout=240)
        yield {
            "http": S3Server(endpoint=f"http://127.0.0.1:{http}", access=ACCESS, secret=SECRET),
            "https": S3Server(
                endpoint=f"https://127.0.0.1:{https}", access=ACCESS, secret=SECRET, authority=certificates.authority
            ),
        }
    finally:
        subprocess.run([HERE / "ceph_down.sh", str(folder)], check=True, timeout=60)


@pytest.fixture(params=["http", "https"])
def place(request, ceph, s3_environment):
    s3_environment(ceph[request.param])
    return new_bucket(ceph[request.param])


class TestCeph(StoreContract):
    """Checksums on, as by default: over https they must not go as trailers, which this gateway answers with 411."""


def test_a_store_without_checksums_keeps_working(place, tmp_path):
    (tmp_path / "out").write_bytes(b"x" * (6 * 1024 * 1024))
    store = open_store(place.root, StoreSettings(checksums=False), patience=QUICK, part_bytes=place.part_bytes)
    store.upload(tmp_path / "out", "large", should_stop=never)
    assert store.stat("large").size == 6 * 1024 * 1024
    assert probe(store).conditional


@pytest.mark.parametrize(("name", "wrong"), [("secret", "SignatureDoesNotMatch"), ("access", "InvalidAccessKeyId")])
def test_wrong_credentials_are_denied_with_the_reason(place, s3_environment, name, wrong):
    s3_environment(replace(place.server, **{name: "WRONG"}))
    store = open_store(place.root, SETTINGS, patience=QUICK)
    for call in (lambda: store.stat("k"), lambda: store.write("k", b""), lambda: list(store.list())):
        with pytest.raises(DeniedError, match=wrong):
            call()


def test_a_missing_bucket_is_not_found(place):
    with pytest.raises(NotFoundError):
        open_store(f"s3://no-{uuid.uuid4().hex}/x", SETTINGS, patience=QUICK).write("k", b"")
