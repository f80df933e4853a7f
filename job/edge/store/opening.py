"""From a URI to its store: the one table of schemes says how a URI splits and how its store is opened."""

import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from job.core.errors import UsageError
from job.edge.store.directory import DirectoryStore
from job.edge.store.objects import PART_BYTES, ObjectStore, StoreSettings
from job.edge.store.patience import STORE_PATIENCE, Patience

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where a URI points: an object or a prefix below a root that can be opened."""

    scheme: str
    top: str
    """What follows `scheme://` in the root: a bucket, or the absolute path of the folder that a file stands in."""
    key: str
    """Below the root; empty, or with a "/" at its end, it is a prefix."""

    @property
    def root(self) -> str:
        """The root's URI: s3://bucket, or file:///folder."""
        return f"{self.scheme}://{self.top}"

    def uri_of(self, key: str) -> str:
        """The URI of a key below the root."""
        return f"{self.root.removesuffix('/')}/{key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scheme:
    """One kind of store; `rest` is what follows `scheme://` in a URI."""

    name: str
    """In full URIs."""
    full_uri: Callable[[str], str]
    """rest -> the URI, checked and written out."""
    split: Callable[[str], tuple[str, str]]
    """rest of a full URI, or of its beginning -> top and key of its location."""
    open: Callable[[Location, StoreSettings, Patience, int], ObjectStore]
    """Location, settings, patience, bytes of a part -> the store that has the location for its root."""
    local_path: Callable[[str], Path] | None = None
    """rest -> a path on this machine; None: it stands elsewhere."""
    credentials: Callable[[], str] | None = None
    """Where its credentials come from, in words; None: it needs none."""


def open_store(
    uri: str, settings: StoreSettings, *, patience: Patience = STORE_PATIENCE, part_bytes: int = PART_BYTES
) -> ObjectStore:
    """The store whose root is `uri`: s3://bucket/prefix, file:///folder, or a local path.

    Nothing is asked of the store yet.

    Raises:
        UsageError: no such kind of store, no bucket, or credentials in the URI.
    """
    location = locate(full_uri(uri))
    return _SCHEMES[location.scheme].open(location, settings, patience, part_bytes)


def full_uri(uri: str) -> str:
    """A URI written out: a local path becomes a file URI with an absolute path; a "/" at the end is kept.

    Raises:
        UsageError: no such kind of store, no bucket, or credentials in the URI.
    """
    scheme, rest = _split(uri)
    return scheme.full_uri(rest)


def locate(full: str) -> Location:
    """Split a full URI, or the beginning of one: a glob's, up to its first wildcard."""
    scheme, rest = _split(full)
    top, key = scheme.split(rest)
    return Location(scheme=scheme.name, top=top, key=key)


def store_and_key(uri: str) -> tuple[str, str]:
    """The root to open and the key in it, for one object: the bucket for S3, the folder for a file.

    Raises:
        UsageError: the URI names no object.
    """
    location = locate(full_uri(uri))
    if not location.key or location.key.endswith("/"):
        raise UsageError(f"{uri}: names a folder where one object is needed")
    return location.root, location.key


def local_path(uri: str) -> Path | None:
    """What a file URI or a local path names on this machine; None for a URI of any other store.

    Here a file URI is decoded, since programs write a blank as `%20`; a store's root is not: keys may hold any sign.

    Raises:
        UsageError: no such kind of store.
    """
    scheme, rest = _split(uri)
    return None if scheme.local_path is None else scheme.local_path(rest)


def credentials_source(uris: Sequence[str]) -> str:
    """Where the credentials for these URIs come from, in words.

    Raises:
        DeniedError: a store needs credentials, and there are none.
    """
    names = dict.fromkeys(_name_and_rest(uri)[0] for uri in uris)
    sources = [_SCHEMES[name].credentials for name in names if name in _SCHEMES]
    return "; ".join(source() for source in sources if source is not None) or "none needed: nothing is on S3"


def _split(uri: str) -> tuple[_Scheme, str]:
    name, rest = _name_and_rest(uri)
    if name not in _SCHEMES:
        raise UsageError(f"{name}://: no such kind of store; use s3://bucket/key, file:///path or a local path")
    return _SCHEMES[name], rest


def _name_and_rest(uri: str) -> tuple[str | None, str]:
    name, separator, rest = uri.partition("://")
    return (name, rest) if separator else (None, uri)


def _bucket_uri(rest: str) -> str:
    bucket, _, key = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        # The URI is not repeated: it would carry a secret into the log.
        raise UsageError("s3://: credentials do not belong into a URI; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if not _BUCKET.fullmatch(bucket):
        raise UsageError(f"s3://{rest}: {bucket!r} is no bucket name; write s3://bucket/key")
    return f"s3://{bucket}/{key}"


def _split_bucket(rest: str) -> tuple[str, str]:
    bucket, _, key = rest.partition("/")
    return bucket, key


def _open_bucket(location: Location, settings: StoreSettings, patience: Patience, part_bytes: int) -> ObjectStore:
    from job.edge.store.s3.store import S3Store  # boto3 takes a third of a second, which --help need not pay

    return S3Store(location.top, location.key.strip("/"), settings, patience=patience, part_bytes=part_bytes)


def _aws_credentials() -> str:
    from job.edge.store.s3 import bucket  # as above

    return f"AWS, found by: {bucket.credentials_source()}"


def _file_uri(rest: str) -> str:
    if not rest.startswith("/"):
        raise UsageError(
            f"file://{rest}: a file URI has three slashes and an absolute path, as in file:///data/train.jsonl"
        )
    return _path_uri(rest)


def _path_uri(path: str) -> str:
    if not path:
        raise UsageError("an empty path names no store; write s3://bucket/key, file:///path or a local path")
    absolute = os.path.abspath(path)  # noqa: PTH100 - pathlib's would keep "..", and resolve() would follow links
    return f"file://{absolute}/" if path.endswith("/") and absolute != "/" else f"file://{absolute}"


def _open_folder(location: Location, _settings: StoreSettings, _patience: Patience, _part_bytes: int) -> ObjectStore:
    return DirectoryStore(Path(location.top) / location.key)


def _decoded_path(rest: str) -> Path:
    return Path(unquote(urlsplit(f"file://{rest}").path))


_SCHEMES: Mapping[str | None, _Scheme] = {
    "s3": _Scheme(
        name="s3", full_uri=_bucket_uri, split=_split_bucket, open=_open_bucket, credentials=_aws_credentials
    ),
    "file": _Scheme(
        name="file", full_uri=_file_uri, split=posixpath.split, open=_open_folder, local_path=_decoded_path
    ),
    None: _Scheme(name="file", full_uri=_path_uri, split=posixpath.split, open=_open_folder, local_path=Path),
}
"""By scheme; None: a local path, which has none. Another kind of store is another line."""
