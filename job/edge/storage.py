"""Object storage by URI: opens s3:// and file:// stores, expands globs, and tries out what a store can do."""

import contextlib
import os
import posixpath
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from job.core.errors import DeniedError, NotFoundError, StopRequestedError, UsageError
from job.edge.directory import DirectoryStore
from job.edge.globs import has_glob, literal_prefix, matcher
from job.edge.lanes import Lanes
from job.edge.objects import (
    CONTROL_BYTES,
    PART_BYTES,
    Downloaded,
    Entry,
    ObjectStore,
    PreconditionError,
    StoredObject,
    StoreSettings,
    Uploaded,
)
from job.edge.patience import Patience

__all__ = [
    "CONTROL_BYTES",
    "PART_BYTES",
    "Downloaded",
    "Entry",
    "ObjectStore",
    "Patience",
    "PreconditionError",
    "Probe",
    "StoreSettings",
    "StoredObject",
    "Uploaded",
    "credentials_source",
    "expand",
    "open_store",
    "probe",
    "store_and_key",
]

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_DEFAULT_PATIENCE = Patience()
_RACES = 3
"""Rounds of the probe: a store that is only sometimes atomic shows it in most of them."""
_RACERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a store let us do under a root; that it let us write is why there is a probe at all."""

    conditional: bool
    """Create-only and If-Match hold, and of many at once one wins: a lock and a swap can be trusted."""
    deletes: bool
    """Old checkpoints can be removed."""
    reason: str
    """What is missing, for the report; empty when nothing is."""


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
    from job.edge.s3 import S3Store  # boto3 takes a third of a second, which --help need not pay

    return S3Store(bucket, path.strip("/"), settings, patience=patience, part_bytes=part_bytes)


def credentials_source(uris: Sequence[str]) -> str:
    """Where the credentials for these URIs come from, in words.

    Raises:
        DeniedError: one is on S3, and there are no credentials.
    """
    if not any(uri.startswith("s3://") for uri in uris):
        return "none needed: nothing is on S3"
    from job.edge import s3_bucket  # as above

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


def expand(
    uris: Sequence[str],
    settings: StoreSettings,
    *,
    should_stop: Callable[[], bool],
    patience: Patience = _DEFAULT_PATIENCE,
) -> list[StoredObject]:
    """The objects that URIs name, sorted and without duplicates.

    A URI is one object, a glob (`*`, `?`, `[...]`, and `**` for any depth), or everything below a prefix that ends in
    "/". As in a shell, wildcards and prefixes leave out names that begin with a dot.

    Raises:
        NotFoundError: a URI matches nothing.
    """
    stores: dict[str, ObjectStore] = {}

    def opened(root: str) -> ObjectStore:
        if root not in stores:
            stores[root] = open_store(root, settings, patience=patience)
        return stores[root]

    names: set[str] = set()
    for uri in uris:
        names.update(_names(uri, opened, should_stop))

    wanted = [store_and_key(name) for name in sorted(names)]
    for root, _ in wanted:
        opened(root)
    with Lanes("looking at the data's objects", should_stop) as lanes:
        return [*lanes.in_order(partial(stores[root].stat, key, cancelled=lanes.cancelled) for root, key in wanted)]


def probe(store: ObjectStore) -> Probe:
    """Write, write on conditions, and delete a scratch object under the root.

    Raises:
        DeniedError: the credentials may not write there.
    """
    key = f".probe-{secrets.token_hex(8)}"
    races = [f"{key}-{number}" for number in range(_RACES)]
    reason = _missing_conditions(store, key) or _lost_races(store, races)
    try:
        store.delete([key, *races])
    except DeniedError as error:
        return Probe(conditional=not reason, deletes=False, reason="; ".join(filter(None, [reason, str(error)])))
    return Probe(conditional=not reason, deletes=True, reason=reason)


def _missing_conditions(store: ObjectStore, key: str) -> str:
    """What of conditional writes a store lacks; empty when it has both kinds."""
    try:
        store.write(key, b"1", create_only=True)
    except UsageError as error:
        store.write(key, b"1")
        return f"{store.uri}: no create-only writes ({error})"
    with contextlib.suppress(PreconditionError):
        store.write(key, b"2", create_only=True)
        return f"{store.uri}: create-only is ignored, a second write replaced the first"
    try:
        etag = store.write(key, b"3", if_match=store.stat(key).etag)
    except (PreconditionError, UsageError) as error:
        return f"{store.uri}: no writes with If-Match ({error})"
    with contextlib.suppress(PreconditionError):
        store.write(key, b"4", if_match="0" * len(etag))
        return f"{store.uri}: If-Match is ignored, a write with a wrong ETag went through"
    return ""


def _lost_races(store: ObjectStore, keys: Sequence[str]) -> str:
    """What goes wrong when several create the same object at once; empty when one of them wins each time."""

    def wins(key: str, number: int) -> bool:
        try:
            store.write(key, b"%d" % number, create_only=True)
        except PreconditionError:
            return False
        return True

    with ThreadPoolExecutor(_RACERS, thread_name_prefix="probe") as pool:
        for key in keys:
            winners = sum(pool.map(partial(wins, key), range(_RACERS)))
            if winners > 1:
                return (
                    f"{store.uri}: create-only is not atomic, {winners} of {_RACERS} writers at once were let through"
                )
    return ""


def _names(uri: str, opened: Callable[[str], ObjectStore], should_stop: Callable[[], bool]) -> Iterator[str]:
    """The full URIs of the objects that one URI matches."""
    bucket, path = _bucket_and_path(uri)
    if not has_glob(path) and path and not path.endswith("/"):
        yield uri if bucket is not None else f"file://{path}"
        return
    matches = matcher(path)
    start = literal_prefix(path)
    root = f"s3://{bucket}" if bucket is not None else f"file://{posixpath.dirname(start)}"
    inside = start if bucket is not None else posixpath.basename(start)
    found = False
    for entry in opened(root).list(inside):
        if should_stop():
            raise StopRequestedError(f"stopped on request while listing {uri}")
        full = entry.key if bucket is not None else posixpath.join(posixpath.dirname(start), entry.key)
        if matches(full):
            found = True
            yield f"s3://{bucket}/{full}" if bucket is not None else f"file://{full}"
    if not found:
        raise NotFoundError(f"{uri}: matches no object; correct the URI, or put the data there")


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
