"""Local files that appear whole or not at all: written beside their place, synced, then renamed; and their sha256."""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from job.core.errors import JobError, LocalDiskError, StopRequestedError

TEMPORARY = ".incoming-"
"""What the name of every file begins with while it is being written."""
_CHUNK_BYTES = 1 << 20
"""Hashed at once: a stop request is seen between two chunks."""


def local_trouble(error: OSError, path: Path) -> JobError:
    """What a failed access to the local disk means to the operator."""
    return LocalDiskError(f"{path}: {error.strerror or error}; give the folder more room, or name a writable one")


class WholeFile:
    """A file being written, with the sha256 of what was written so far."""

    def __init__(self, file: io.FileIO, fail: Callable[[OSError], JobError]) -> None:
        self.size = 0
        """Bytes."""
        self._file = file
        self._fail = fail
        self._sha256 = hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append; a full disk becomes the operator's error."""
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._fail(error) from error
        self._sha256.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        """Hex digest of what was written."""
        return self._sha256.hexdigest()


@contextlib.contextmanager
def whole_file(
    path: Path,
    *,
    trouble: Callable[[OSError, Path], JobError] = local_trouble,
    place: Callable[[Path, Path], None] = os.replace,
    durable: bool = True,
) -> Iterator[WholeFile]:
    """A file that takes its place at the end of the block; after any exception nothing of it is left.

    `trouble` translates an OSError; `place` moves the finished file, and may raise what is not an OSError. What is not
    `durable` does not wait for the disk, and may be torn by a power failure: for what is verified when it is read.
    """

    def fail(error: OSError) -> JobError:
        return trouble(error, path)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, file = _begun(path)
    except OSError as error:
        raise fail(error) from error
    try:
        with file:
            yield WholeFile(file, fail)
            try:
                if durable:
                    os.fsync(file.fileno())
                place(temporary, path)
                if durable:
                    sync_folder(path.parent)
            except OSError as error:
                raise fail(error) from error
    finally:
        with contextlib.suppress(OSError):  # it took its place; or the disk that failed will not remove it either
            temporary.unlink()


def _begun(path: Path) -> tuple[Path, io.FileIO]:
    """A new file beside the path, under a lock that distinguishes it from one whose writer died: see `remove_dead`."""
    while True:
        temporary = path.with_name(TEMPORARY + secrets.token_hex(8))
        # Unbuffered: a buffer that meets a full disk fails once more, untranslated, when the file is closed.
        file = temporary.open("xb", buffering=0)
        locked = _lock(file)
        if locked is None or (locked and temporary.exists()):
            return temporary, file
        file.close()  # between opening and locking it was taken for dead


def _lock(file: io.IOBase) -> bool | None:
    """Whether we hold the lock of a file; None where its file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_dead(folder: Path) -> int:
    """Remove the temporary files in a folder whose writers died, and count them."""
    removed = 0
    for temporary in folder.glob(TEMPORARY + "*"):
        with contextlib.suppress(OSError), temporary.open("rb") as file:
            if _lock(file):
                temporary.unlink()
                removed += 1
    return removed


def file_sha256(path: Path, should_stop: Callable[[], bool]) -> str:
    """The sha256 of a file, as hex digits.

    Raises:
        OSError: it cannot be read.
        StopRequestedError: asked to stop while it is read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            if should_stop():
                raise StopRequestedError(f"stopped on request while reading {path}")
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder; they make names durable by themselves.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF}:
            raise
    finally:
        os.close(descriptor)
