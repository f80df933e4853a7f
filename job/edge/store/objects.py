"""What a store promises: the values it speaks in, and the protocol that every kind of store keeps."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from job.core.errors import UsageError

PART_BYTES = 16 * 1024 * 1024
"""Size of one part of a transfer: large enough that a request's latency is small beside it, small enough to repeat."""
PARALLEL = 8
"""Requests under way at once: fills a 10 Gbit/s link, and holds at most PARALLEL * PART_BYTES (128 MiB) in memory."""
CONTROL_BYTES = 16 * 1024 * 1024
"""Most that `read` takes into memory: reports and run records, which name every object of the data."""
MANIFEST_BYTES = 2 * 1024 * 1024
"""Most of a manifest: ten thousand files."""
ATTEMPT_BYTES = 1024 * 1024
"""Most of a record of an attempt, which may hold the stacks of all threads."""
SMALL_BYTES = 64 * 1024
"""Most of a lock and of a hint: a dozen short values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """The recipe's `store` section."""

    sse_kms_key: str | None = None
    """KMS key id for SSE-KMS; None leaves encryption to the bucket's own default."""
    checksums: bool = True
    """False sends checksums only where S3 requires them, for stores that refuse them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of a listing."""

    key: str
    """Relative to the store's root."""
    size: int
    """Bytes."""
    modified: float
    """Unix seconds, by the store's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """One object as it stands in the store now."""

    uri: str
    key: str
    """Relative to the store's root."""
    size: int
    """Bytes."""
    etag: str
    """Changes whenever the content does; without quotes. For a file it is the sha256 of the content."""
    version: str | None
    """The version's id, where the bucket keeps versions."""
    md5: str | None = None
    """The content's MD5, where the store gives it; not part of its identity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded:
    """What arrived in a local file."""

    size: int
    """Bytes."""
    sha256: str
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """What was sent from a local file."""

    size: int
    """Bytes."""
    sha256: str


class PreconditionError(Exception):
    """The key of a create-only write exists, or the object is no longer the one that `if_match` names.

    Not a failure of the job: the caller decides what it means.
    """


class ObjectStore(Protocol):
    """Objects under one root; keys are relative to it. Safe to share between threads.

    Every method raises DeniedError where the store forbids it, UnavailableError when the store does not answer within
    our own retries, and NotFoundError where a key or the bucket does not exist.
    """

    @property
    def uri(self) -> str:
        """The root: s3://bucket/prefix or file:///folder."""
        ...

    def list(self, prefix: str = "", *, without: str | None = None) -> Iterator[Entry]:
        """Every object whose key begins with `prefix` (a string, not a folder), sorted by key.

        What stands in a folder named `without`, at any depth, is left out, and costs little however much it is.
        """
        ...

    def folders(self, prefix: str = "") -> Iterator[str]:
        """The names of the folders `prefix...` that hold anything, without looking into them."""
        ...

    def stat(self, key: str, *, cancelled: threading.Event | None = None) -> StoredObject:
        """Size and identity of one object; on another thread it ends early when nobody waits for it any more."""
        ...

    def read(self, key: str, *, max_bytes: int = CONTROL_BYTES) -> tuple[bytes, str]:
        """The content of a small object, and its ETag.

        Raises:
            DataError: it is larger than `max_bytes`.
        """
        ...

    def read_part(self, key: str, *, start: int, length: int, etag: str) -> bytes:
        """`length` bytes of an object from `start` on, all of which it must have.

        Raises:
            DataError: the object is not (or no longer) the one with this `etag`, or ends before.
        """
        ...

    def write(self, key: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> str:
        """Write a small object whole and return its ETag; with a condition, of several writers one wins.

        Raises:
            PreconditionError: `create_only` and the key exists, or the object's ETag is not `if_match`.
        """
        ...

    def download(
        self,
        key: str,
        path: Path,
        *,
        etag: str | None = None,
        sha256: str | None = None,
        should_stop: Callable[[], bool],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Downloaded:
        """Bring one object to `path`, which appears whole or not at all; `on_progress` gets done and all bytes.

        Raises:
            DataError: the object is not (or no longer) the one with this `etag` or `sha256`.
            LocalDiskError: `path` cannot be written.
            StopRequestedError: `should_stop` became true.
        """
        ...

    def upload(
        self,
        path: Path,
        key: str,
        *,
        create_only: bool = False,
        if_match: str | None = None,
        should_stop: Callable[[], bool],
    ) -> Uploaded:
        """Send one file, of any size; the object appears whole or not at all.

        Raises:
            LocalDiskError: `path` cannot be read.
            PreconditionError: as `write`; also when only the answer was lost, and our own object stands there.
            StopRequestedError: `should_stop` became true.
        """
        ...

    def clear_unfinished(self, prefix: str) -> int:
        """Remove what unfinished uploads below a prefix left, and return how many there were.

        Only for a caller that knows that nobody uploads there.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; a key that does not exist is no error."""
        ...


def check_key(key: str) -> str:
    """The key itself, when it names an object below the root.

    Raises:
        UsageError: it is empty, names a folder, or could leave the root.
    """
    if not key or key.startswith("/") or key.endswith("/") or "\0" in key:
        raise UsageError(f"{key!r} is no key: it must not be empty, nor begin or end with '/'")
    if any(part in {".", ".."} for part in key.split("/")):
        raise UsageError(f"{key!r} is no key: it must not contain '.' or '..' as a folder")
    return key
