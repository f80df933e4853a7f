"""Object storage by URI: opens s3:// and file:// stores, expands globs, and tries out what a store can do."""

import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path

from job.core.errors import UsageError
from job.edge.store.directory import DirectoryStore
from job.edge.store.objects import (
    PART_BYTES,
    ObjectStore,
    StoreSettings,
)
from job.edge.store.patience import Patience

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_DEFAULT_PATIENCE = Patience()


def open_store(
    uri: str, settings: StoreSettings, *, patience: Patience = _DEFAULT_PATIENCE, part_bytes: int = PART_BYTES
) -> ObjectStore:
    """The store whose root is `uri`: s3://bucket/prefix, file:///folder, or a local path.

    Nothing is asked of the store yet.

    Raises:
        UsageError: no such kind of store, no bucket, or credentials in the URI.
    """
    bucket, path = _bucket_and_path(uri)
    if bucket is None:
        return DirectoryStore(Path(path))
    from job.edge.store.s3 import S3Store  # boto3 takes a third of a second, which --help need not pay

    return S3Store(bucket, path.strip("/"), settings, patience=patience, part_bytes=part_bytes)


def credentials_source(uris: Sequence[str]) -> str:
    """Where the credentials for these URIs come from, in words.

    Raises:
        DeniedError: one is on S3, and there are no credentials.
    """
    if not any(uri.startswith("s3://") for uri in uris):
        return "none needed: nothing is on S3"
    from job.edge.store import s3_bucket  # as above

    return f"AWS, found by: {s3_bucket.credentials_source()}"


def store_and_key(uri: str) -> tuple[str, str]:
    """The root to open and the key in it, for one object: the bucket for S3, the folder for a file.

    Raises:
        UsageError: the URI names no object.
    """
    bucket, path = _bucket_and_path(uri)
    if not path or path.endswith("/"):
        raise UsageError(f"{uri}: names a folder where one object is needed")
    if bucket is not None:
        return f"s3://{bucket}", path
    return f"file://{posixpath.dirname(path)}", posixpath.basename(path)


def _bucket_and_path(uri: str) -> tuple[str | None, str]:
    """The bucket and the key or prefix in it; without a bucket an absolute local path. A last "/" is kept."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return None, _local(uri)
    if scheme == "file":
        if not rest.startswith("/"):
            raise UsageError(
                f"{uri}: a file URI has three slashes and an absolute path, as in file:///data/train.jsonl"
            )
        return None, _local(rest)
    if scheme != "s3":
        raise UsageError(f"{scheme}://: no such kind of store; use s3://bucket/key, file:///path or a local path")
    bucket, _, path = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        # The URI is not repeated: it would carry a secret into the log.
        raise UsageError("s3://: credentials do not belong into a URI; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"{uri}: {bucket!r} is no bucket name; write s3://bucket/key")
    return bucket, path


def _local(path: str) -> str:
    if not path:
        raise UsageError("an empty path names no store; write s3://bucket/key, file:///path or a local path")
    absolute = os.path.abspath(path)  # noqa: PTH100 - pathlib's would keep "..", and resolve() would follow links
    return f"{absolute}/" if path.endswith("/") and absolute != "/" else absolute
