"""Where a merged model goes: written aside first, then whole in its place or not there at all."""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from job.core.errors import LockedError, NotFoundError, RunConflictError, StopRequestedError, UsageError
from job.edge.relative_paths import located
from job.edge.store.folder import MANIFEST, FileEntry, StoredFolder, refuse_if_full
from job.edge.store.json_objects import json_bytes, json_object
from job.edge.store.objects import MANIFEST_BYTES, ObjectStore, PreconditionError, StoreSettings
from job.edge.store.opening import full_uri, local_path, open_store, store_and_key
from job.edge.store.whole_files import local_trouble, sync_folder, whole_file

EXPORT_JSON = "export.json"
_LAST = "config.json"
"""Without it nothing takes a folder for a model: where names appear one by one, it is the last of the files."""
_ASIDE = ".unfinished"
"""What the name of a folder that is being filled ends with, or is, where the place is a volume."""
_OF_VOLUMES = frozenset({"lost+found"})
"""What an empty volume holds."""
_BEGUN = "UNFINISHED.json"
"""Stands in a store while a model is being uploaded there: what lies beside it is ours, and may be written again."""


class Aside:
    """A local folder that is being filled."""

    def __init__(self, path: Path, should_stop: Callable[[], bool]) -> None:
        self.path = path
        self.files: dict[str, FileEntry] = {}
        """Those that were written."""
        self._should_stop = should_stop

    def write(self, name: str, pieces: Iterable[bytes | memoryview], on_bytes: Callable[[int], None]) -> None:
        """Write one file, piece by piece.

        Raises:
            LocalDiskError: it cannot be written.
            StopRequestedError: asked to stop.
        """
        with whole_file(self.path / name) as file:
            for piece in pieces:
                if self._should_stop():
                    raise StopRequestedError(f"asked to stop while {name} was written; nothing was exported")
                file.write(piece)
                on_bytes(file.size)
        self.files[name] = FileEntry(size=file.size, sha256=file.sha256)

    def ordered(self) -> list[str]:
        """Names in the order in which they may appear."""
        return sorted(self.files, key=lambda name: (name == _LAST, name))


class ExportPlace:
    """A folder of this machine, or one in a store."""

    def __init__(self, uri: str, settings: StoreSettings, *, workdir: Path, should_stop: Callable[[], bool]) -> None:
        """Nothing is looked at yet.

        Args:
            uri: a local folder, or s3://bucket/folder.
            settings: of the store.
            workdir: where a model is put together that goes into a store.
            should_stop: polled while files move.

        Raises:
            UsageError: it is no place for a folder.
        """
        self.uri = full_uri(uri).rstrip("/")
        self._should_stop = should_stop
        path = local_path(uri)
        self._local = None if path is None else Path(os.path.abspath(path))  # noqa: PTH100 - links stay links
        self._workdir = workdir
        self._store: ObjectStore | None = None
        self._is_mount = self._local is not None and os.path.ismount(self._local)  # a volume: it cannot be renamed to
        if self._local is None:
            try:
                root, key = store_and_key(self.uri)
            except UsageError as error:
                raise UsageError(f"--to {located(uri)}: name a folder in the bucket, as s3://bucket/merged") from error
            self._store, self._key = open_store(root, settings), key
            self._folder = StoredFolder(self._store, key)
            self.uri = self._folder.uri

    def whole(self) -> dict[str, Any] | None:
        """The export.json of a model that stands there whole; None: nothing is there, or the rest of a try of ours.

        Raises:
            UsageError: something else is there.
        """
        try:
            return self._whole_here(self._local) if self._local is not None else self._whole_in_store()
        except (ValueError, NotFoundError) as error:
            raise UsageError(
                f"--to {located(self.uri)}: is not empty, and holds no model of this job ({error}); name a folder "
                "that is not there yet"
            ) from error

    def _whole_here(self, path: Path) -> dict[str, Any] | None:
        if path.exists() and not path.is_dir():
            raise UsageError(f"--to {located(self.uri)}: is a file; name a folder that is not there yet")
        names = {each.name for each in path.iterdir()} - _OF_VOLUMES if path.is_dir() else set()
        if not names or (self._is_mount and _ASIDE in names):
            return None
        file = path / EXPORT_JSON
        if not file.is_file() or file.stat().st_size > MANIFEST_BYTES:
            raise NotFoundError(f"no {EXPORT_JSON}")
        return json_object(file.read_bytes())

    def _whole_in_store(self) -> dict[str, Any] | None:
        sizes = self._folder.sizes()
        if not sizes or (MANIFEST not in sizes and _BEGUN in sizes):
            return None
        if MANIFEST not in sizes:
            raise NotFoundError(f"no {MANIFEST}")
        assert self._store is not None, "it is in a store"
        return json_object(self._store.read(f"{self._key}/{EXPORT_JSON}", max_bytes=MANIFEST_BYTES)[0])

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether each of these files stands there with so many bytes."""
        if self._local is None:
            found = self._folder.sizes()
        else:
            found = {name: file.stat().st_size for name in sizes if (file := self._local / name).is_file()}
        return all(found.get(name) == size for name, size in sizes.items())

    @contextlib.contextmanager
    def aside(self, *, needed_bytes: int) -> Iterator[Aside]:
        """A folder to be filled, empty at first, and gone at the end unless it took its place.

        Raises:
            LocalDiskError: it has no room, or cannot be made.
            LockedError: another process fills it.
        """
        if self._local is not None:
            beside = self._local.with_name(f".{self._local.name}{_ASIDE}")
            path = self._local / _ASIDE if self._is_mount else beside
        else:
            path = self._workdir / "exports" / hashlib.sha256(self.uri.encode()).hexdigest()[:16]
        try:
            refuse_if_full(path, needed_bytes=needed_bytes - _used(path))
            with _alone(path):
                _clear(path)
                try:
                    yield Aside(path, self._should_stop)
                finally:
                    shutil.rmtree(path, ignore_errors=True)
        except OSError as error:
            raise local_trouble(error, path) from error

    def commit(self, aside: Aside, facts: Mapping[str, Any], on_bytes: Callable[[int, int], None]) -> None:
        """Put a filled folder in its place.

        Args:
            aside: the folder.
            facts: what it is, for the manifest in a store.
            on_bytes: called with the bytes that are there, and those of all files.

        Raises:
            UsageError: something stands there by now.
        """
        if self._is_mount and self._local is not None:
            self._move_in(aside, self._local)
        elif self._local is not None:
            self._move(aside.path, self._local)
        else:
            self._upload(aside, facts, on_bytes)

    def _move(self, aside: Path, place: Path) -> None:
        sync_folder(aside)
        try:
            os.rename(aside, place)  # noqa: PTH104 - replaces an empty folder, and no other
        except OSError as error:
            if place.exists():
                raise UsageError(f"--to {located(self.uri)}: something came there meanwhile; name another") from error
            raise local_trouble(error, place) from error
        sync_folder(place.parent)

    def _move_in(self, aside: Aside, place: Path) -> None:
        """File by file: while they are moved, and after a kill, the folder aside still stands between them."""
        _clear(place, but={_ASIDE, *_OF_VOLUMES})  # the rest of a try of ours; `whole` has looked
        for name in aside.ordered():
            (place / name).parent.mkdir(exist_ok=True)
            (aside.path / name).rename(place / name)
        sync_folder(place)

    def _upload(self, aside: Aside, facts: Mapping[str, Any], on_bytes: Callable[[int, int], None]) -> None:
        assert self._store is not None, "it goes into a store"
        self._begin(self._store, facts)
        self._folder.remove({*self._folder.sizes()} - {*aside.files, _BEGUN})  # the rest of an older version's try
        of, done = sum(entry.size for entry in aside.files.values()), 0
        try:
            with self._folder.commit(facts, create_only=True) as files:
                for name in aside.ordered():
                    files[name] = self._folder.upload(aside.path / name, name, should_stop=self._should_stop)
                    done += files[name].size
                    on_bytes(done, of)
        except PreconditionError as error:
            raise RunConflictError(
                f"--to {located(self.uri)}: another export was written there meanwhile; name another place"
            ) from error
        self._folder.remove([_BEGUN])

    def _begin(self, store: ObjectStore, facts: Mapping[str, Any]) -> None:
        """Say what is being uploaded; a try of the same that did not end is gone on with, and no other is touched."""
        key = f"{self._key}/{_BEGUN}"
        try:
            store.write(key, json_bytes({**facts}), create_only=True)
        except PreconditionError as error:
            if json_object(store.read(key, max_bytes=MANIFEST_BYTES)[0]) != json_object(json_bytes({**facts})):
                raise UsageError(
                    f"--to {located(self.uri)}: another export was begun there and did not end; delete what is there, "
                    "or name another place"
                ) from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a folder; the hold ends with the process, however that ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"{path}: another export is being written there",
                action="let the other export end, or name another place",
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _clear(path: Path, *, but: Collection[str] = ()) -> None:
    for each in path.iterdir():
        if each.name in but:
            continue
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()


def _used(path: Path) -> int:
    """Bytes of what an earlier try left, which is cleared first."""
    try:
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    except OSError:
        return 0
