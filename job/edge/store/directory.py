"""A folder as a store: file:// with the same promises as S3, also between processes on one shared file system."""

import builtins
import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import stat as modes
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from job.core.errors import (
    DataError,
    DeniedError,
    JobError,
    LocalDiskError,
    NotFoundError,
    StopRequestedError,
    UnavailableError,
    UsageError,
)
from job.edge.store.objects import (
    CONTROL_BYTES,
    Downloaded,
    Entry,
    PreconditionError,
    StoredObject,
    Uploaded,
    check_key,
)
from job.edge.store.whole_files import TEMPORARY, WholeFile, local_trouble, remove_dead, whole_file

_LOCK = ".store-lock"
"""Held (flock) by every writer of control objects: of two processes that compare and swap, one wins."""
_PATIENCE_SECONDS = 60.0
"""Longest that a writer may hold that lock: it takes milliseconds, unless its process is frozen."""
_PAUSE_SECONDS = 0.005
_CHUNK_BYTES = 1024 * 1024
"""Read and written at once: a stop request is seen between two chunks."""
_MISSING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_DENIED = {errno.EACCES, errno.EPERM}
_AWAY = {errno.ESTALE, errno.ETIMEDOUT, errno.EIO, errno.EHOSTDOWN, errno.ENOLCK}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


def store_trouble(error: OSError, path: Path) -> JobError:
    """What a failed access to a file:// store means to the operator."""
    where, reason = f"file://{path}", error.strerror or str(error)
    if error.errno in _MISSING:
        return NotFoundError(f"{where}: {reason}; correct the URI")
    if error.errno in _DENIED:
        return DeniedError(f"{where}: {reason}; give user {os.geteuid()} access to it")
    if error.errno in _AWAY:
        return UnavailableError(f"{where}: {reason}; look at the file system, then start the same job again")
    return LocalDiskError(f"{where}: {reason}; give the folder more room, or name a writable one")


class DirectoryStore:
    """An ObjectStore in a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def uri(self) -> str:
        """The root, as file:///folder."""
        return f"file://{self._root}"

    def list(self, prefix: str = "", *, without: str | None = None) -> Iterator[Entry]:
        """Every file whose key begins with `prefix`, sorted; nothing is hashed, nothing beside it is looked at."""
        folder, _, begins = prefix.rpartition("/")
        if folder:
            check_key(folder)
        place = f"{folder}/" if folder else ""
        found = _walk(self._root / folder, place, above=frozenset(), begins=begins, without=without)
        yield from sorted(found, key=lambda entry: entry.key)

    def folders(self, prefix: str = "") -> Iterator[str]:
        """The names of the folders that begin with `prefix`."""
        folder, _, begins = prefix.rpartition("/")
        if folder:
            check_key(folder)
        _, entries = _scan(self._root / folder)
        yield from sorted(entry.name for entry in entries if entry.name.startswith(begins) and entry.is_dir())

    def stat(self, key: str, *, cancelled: threading.Event | None = None) -> StoredObject:
        """Size and sha256 of one file: it is read."""
        path = self._path(key)
        sha256, size = hashlib.sha256(), 0
        for chunk in _chunks(path, store_trouble):
            if cancelled is not None:
                _continue(cancelled.is_set, f"reading file://{path}")
            sha256.update(chunk)
            size += len(chunk)
        return StoredObject(uri=f"file://{path}", key=key, size=size, etag=sha256.hexdigest(), version=None)

    def read(self, key: str, *, max_bytes: int = CONTROL_BYTES) -> tuple[bytes, str]:
        """The content of a small file, and its sha256."""
        path, data = self._path(key), b""
        for chunk in _chunks(path, store_trouble):
            data += chunk
            if len(data) > max_bytes:
                raise DataError(
                    f"file://{path}: larger than the {max_bytes:,} bytes expected of it, so not of this job"
                )
        return data, hashlib.sha256(data).hexdigest()

    def read_part(self, key: str, *, start: int, length: int, etag: str) -> bytes:
        """A piece of a file; its hash is not looked at, which would read all of it."""
        del etag
        path = self._path(key)
        try:
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(length)
        except OSError as error:
            raise store_trouble(error, path) from error
        if len(data) != length:
            raise DataError(f"file://{path}: ends before byte {start + length:,}; copy it again")
        return data

    def write(self, key: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> str:
        """Write a small file whole, under the store's lock."""
        path = self._path(key)
        with self._locked():
            if if_match is not None and self._etag(key) != if_match:
                raise PreconditionError(f"file://{path}: not the content that was read before")
            with whole_file(path, trouble=store_trouble, place=_create if create_only else os.replace) as file:
                file.write(data)
        return file.sha256

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
        """Copy one file to `path`, checked while it is read."""
        source = self._path(key)
        try:
            size = source.stat().st_size
        except OSError as error:
            raise store_trouble(error, source) from error
        with whole_file(path) as file:
            for chunk in _chunks(source, store_trouble):
                _continue(should_stop, f"reading file://{source}")
                file.write(chunk)
                if on_progress is not None:
                    on_progress(file.size, size)
            for expected in (etag, sha256):
                if expected is not None and file.sha256 != expected:
                    raise DataError(
                        f"file://{source}: sha256 is {file.sha256}, expected {expected}: the file was changed; "
                        "start a new run with it, or put the old one back"
                    )
        return Downloaded(size=file.size, sha256=file.sha256, etag=file.sha256)

    def upload(
        self,
        path: Path,
        key: str,
        *,
        create_only: bool = False,
        if_match: str | None = None,
        should_stop: Callable[[], bool],
    ) -> Uploaded:
        """Copy one file into the store."""
        target = self._path(key)

        def place(temporary: Path, target: Path) -> None:
            if create_only:
                _create(temporary, target)
                return
            with self._locked() if if_match is not None else contextlib.nullcontext():
                if if_match is not None and self._etag(key) != if_match:
                    raise PreconditionError(f"file://{target}: not the content that was read before")
                temporary.replace(target)

        with contextlib.ExitStack() as stack:
            # `delete` prunes empty folders: it must not take this one before the temporary file stands in it.
            with self._locked():
                file: WholeFile = stack.enter_context(whole_file(target, trouble=store_trouble, place=place))
            for chunk in _chunks(path, local_trouble):
                _continue(should_stop, f"writing file://{target}")
                file.write(chunk)
        return Uploaded(size=file.size, sha256=file.sha256)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files, and the folders that get empty with them."""
        paths = [self._path(key) for key in keys]
        if not paths or not self._root.is_dir():
            return
        with self._locked():
            for path in paths:
                try:
                    path.unlink(missing_ok=True)
                except NotADirectoryError:
                    continue
                except OSError as error:
                    raise store_trouble(error, path) from error
            for folder in {path.parent for path in paths}:
                self._prune(folder)

    def clear_unfinished(self, prefix: str) -> int:
        """Remove the temporary files of writers that died."""
        top = self._root / prefix
        folders = [folder for folder, _, _ in os.walk(top)]
        return sum(remove_dead(Path(folder)) for folder in folders)

    def _path(self, key: str) -> Path:
        if "//" in check_key(key):
            raise UsageError(f"{key!r} is no key of a folder: it contains '//'")
        name = key.rpartition("/")[2]
        if name == _LOCK or name.startswith(TEMPORARY):
            raise UsageError(f"{key!r} is no key: the store keeps this name for itself")
        return self._root / key

    def _etag(self, key: str) -> str | None:
        try:
            return self.stat(key).etag
        except NotFoundError:
            return None

    def _prune(self, folder: Path) -> None:
        while self._root in folder.parents:
            remove_dead(folder)
            try:
                folder.rmdir()
            except OSError:  # not empty, or gone already: both are what is wanted
                return
            folder = folder.parent

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the writers of this store, threads and processes alike; the system frees a dead one's lock."""
        path = self._root / _LOCK
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            lock = path.open("ab")
        except OSError as error:
            raise store_trouble(error, path) from error
        with lock:
            _hold(lock, path)
            yield


def _hold(lock: BinaryIO, path: Path) -> None:
    # Not by one call that waits: behind a frozen process it would wait for ever. And counted in pauses, not by the
    # clock: while this process itself is frozen, it does not wait.
    for pauses in itertools.count():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if pauses * _PAUSE_SECONDS > _PATIENCE_SECONDS:
                raise UnavailableError(
                    f"file://{path}: another process has held it for {_PATIENCE_SECONDS:g} s; is it frozen? End it "
                    f"(`fuser {path}` names it), then start the same job again"
                ) from error
            time.sleep(_PAUSE_SECONDS)
        except OSError as error:
            raise store_trouble(error, path) from error
        else:
            return


def _create(temporary: Path, path: Path) -> None:
    """Give the finished file its name, unless the name is taken; two who try at once cannot both succeed."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise PreconditionError(f"file://{path}: exists already") from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links: the store's lock alone keeps other writers out.
        if path.exists():
            raise PreconditionError(f"file://{path}: exists already") from error
        temporary.replace(path)


def _continue(should_stop: Callable[[], bool], what: str) -> None:
    if should_stop():
        raise StopRequestedError(f"stopped on request while {what}")


def _chunks(path: Path, trouble: Callable[[OSError, Path], JobError]) -> Iterator[bytes]:
    try:
        if not modes.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            raise NotFoundError(f"file://{path}: not a file; end the URI with '/' to take all files of a folder")
        file = path.open("rb")
    except OSError as error:
        raise trouble(error, path) from error
    with file:
        while True:
            try:
                chunk = file.read(_CHUNK_BYTES)
            except OSError as error:
                raise trouble(error, path) from error
            if not chunk:
                return
            yield chunk


def _walk(
    folder: Path, prefix: str, *, above: frozenset[tuple[int, int]], begins: str = "", without: str | None
) -> Iterator[Entry]:
    """The files below a folder whose names there begin so, in no order; links are followed, but never in a circle."""
    here, entries = _scan(folder)
    if here in above:
        return
    for entry in entries:
        if entry.name == _LOCK or entry.name.startswith(TEMPORARY) or not entry.name.startswith(begins):
            continue
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile, or a link to nothing
            mode = entry.stat()
            if modes.S_ISDIR(mode.st_mode):
                if entry.name != without:
                    place = f"{prefix}{entry.name}/"
                    yield from _walk(folder / entry.name, place, above=above | {here}, without=without)
            elif modes.S_ISREG(mode.st_mode):
                yield Entry(key=prefix + entry.name, size=mode.st_size, modified=mode.st_mtime)


def _scan(folder: Path) -> tuple[tuple[int, int], builtins.list[os.DirEntry[str]]]:
    """A folder's identity and entries; a folder that does not exist is empty, as a prefix is on S3."""
    try:
        found = folder.stat()
        with os.scandir(folder) as entries:
            return (found.st_dev, found.st_ino), [*entries]
    except (FileNotFoundError, NotADirectoryError):
        return (0, 0), []
    except OSError as error:
        raise store_trouble(error, folder) from error
