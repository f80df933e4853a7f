"""URIs and the stores that they open."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from store_contract import SETTINGS

from job.core.errors import DeniedError, UsageError
from job.edge.store.opening import credentials_source, local_path, open_store, store_and_key


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


@pytest.mark.parametrize("uri", ["s3://bucket/a/", "s3://bucket", "file:///d/", "d/", "/"])
def test_a_prefix_is_no_object(uri):
    with pytest.raises(UsageError, match="names a folder where one object is needed"):
        store_and_key(uri)


def test_a_path_on_this_machine_is_known_by_its_scheme():
    assert local_path("models/my%20base") == Path("models/my%20base")  # a name that a folder may have
    assert local_path("file:///models/my%20base") == Path("/models/my base")
    assert local_path("s3://models/base") is None
    with pytest.raises(UsageError, match="gs://: no such kind of store"):
        local_path("gs://models/base")


def test_credentials_are_looked_for_only_where_a_store_needs_them(monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    elsewhere = ["owner/name", "s3", "/data/train.jsonl", "file:///data/valid.jsonl", "gs://bucket"]

    assert credentials_source(elsewhere) == "none needed: nothing is on S3"
    with pytest.raises(DeniedError, match="set AWS_ACCESS_KEY_ID"):
        credentials_source([*elsewhere, "s3://bucket/data"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    assert credentials_source(["s3://bucket/data", *elsewhere, "s3://other/data"]) == "AWS, found by: env"


def test_a_folder_needs_no_boto3():
    script = (
        "import sys; from job.edge.store import listing, probing; from job.edge.store.objects import StoreSettings\n"
        "listing.open_store('x', StoreSettings()); print('boto3' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"
