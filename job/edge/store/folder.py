"""A folder committed by its manifest: files first, manifest last; without a manifest that verifies it does not exist.

{folder}/state.json ...     its files
{folder}/MANIFEST.json      what the folder is, and each file's size and sha256; written last: THE COMMIT

Deleting takes the manifest first. A folder stands in a store or on the local disk; its manifest is the same in both.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from job.core.errors import DataError, LocalDiskError, NotFoundError
from job.edge.store.json_objects import json_bytes, json_object
from job.edge.store.objects import MANIFEST_BYTES, ObjectStore, PreconditionError
from job.edge.store.whole_files import file_sha256, whole_file

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SHA256 = re.compile("[0-9a-f]{64}")
_WORKERS = 8
"""Threads that verify local files: hashing is bound by the disk and by one core each."""

Facts = Mapping[str, Any]
"""What a folder is: the keys of its manifest beside `files`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a manifest."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder is, and its files by name."""

    facts: Facts
    files: Mapping[str, FileEntry]

    def content(self) -> dict[str, Any]:
        """As it is written."""
        return {**self.facts, "files": {name: asdict(entry) for name, entry in self.files.items()}}


class StoredFolder:
    """A folder in a store."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        """`name` is its key below the store's root, without a "/" at its end. Nothing is asked of the store yet."""
        self._store = store
        self._prefix = f"{name}/"
        self.uri = f"{store.uri.rstrip('/')}/{name}"

    def manifest(self, is_ours: Callable[[Facts], bool]) -> Manifest:
        """The manifest of a committed folder.

        Raises:
            NotFoundError: the folder is not committed.
            DataError: the manifest is damaged, or its facts are not ours.
        """
        data = self._store.read(self._prefix + MANIFEST, max_bytes=MANIFEST_BYTES)[0]
        return _parsed(data, is_ours, where=self.uri)

    def is_committed(self) -> bool:
        """Whether there is a manifest; it is not verified."""
        try:
            self._store.stat(self._prefix + MANIFEST)
        except NotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def commit(self, facts: Facts, *, create_only: bool) -> Iterator[dict[str, FileEntry]]:
        """Entries to be filled while the files are uploaded; the end of the block writes them as the manifest.

        After an exception there is no manifest, and so no folder. With `create_only` a manifest is never replaced;
        otherwise whoever else writes it must write the same.

        Raises:
            PreconditionError: another manifest stands there.
        """
        files: dict[str, FileEntry] = {}
        yield files
        manifest = Manifest(facts=facts, files=files).content()
        try:
            self._store.write(self._prefix + MANIFEST, json_bytes(manifest), create_only=create_only)
        except PreconditionError:
            # An earlier try of ours got so far; another writer's would differ.
            if not self._has_manifest(manifest):
                raise

    def upload(
        self,
        path: Path,
        name: str,
        *,
        create_only: bool = False,
        if_match: str | None = None,
        should_stop: Callable[[], bool],
    ) -> FileEntry:
        """Send one file; on a condition as `ObjectStore.upload`."""
        sent = self._store.upload(
            path, self._prefix + name, create_only=create_only, if_match=if_match, should_stop=should_stop
        )
        return FileEntry(size=sent.size, sha256=sent.sha256)

    def download(
        self,
        files: Mapping[str, FileEntry],
        folder: Path,
        *,
        should_stop: Callable[[], bool],
        on_file: Callable[[], None] = lambda: None,
        on_progress: Callable[[int, int], None] = lambda _done, _of: None,
    ) -> None:
        """Bring files into a local folder, each verified against its entry.

        Args:
            files: those wanted.
            folder: where they go.
            should_stop: polled while files arrive.
            on_file: called after each file.
            on_progress: called with the bytes that have arrived and those of all files.

        Raises:
            DataError: a file is not what its entry says.
            NotFoundError: a file does not exist.
        """
        folder.mkdir(parents=True, exist_ok=True)
        before, of = 0, total_bytes(files)
        for name, entry in files.items():
            self._store.download(
                self._prefix + plain_name(name),
                folder / name,
                sha256=entry.sha256,
                should_stop=should_stop,
                on_progress=partial(_progress, on_progress, before, of),
            )
            before += entry.size
            on_file()

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of all that stands in the folder, committed or not."""
        return {entry.key.removeprefix(self._prefix): entry.size for entry in self._store.list(self._prefix)}

    def refuse_other_sizes(self, files: Mapping[str, FileEntry]) -> None:
        """See that what stands in the store has the size of its entry: the local disk was found large enough for that.

        Raises:
            DataError: a file has another size.
        """
        sizes = self.sizes()
        for name, entry in files.items():
            if sizes.get(name, entry.size) != entry.size:
                raise DataError(f"{self.uri}/{name}: has {sizes[name]} bytes, {entry.size} in the manifest")

    def holds(self, files: Mapping[str, FileEntry]) -> bool:
        """Whether each of these files stands in the store, with the size of its entry."""
        sizes = self.sizes()
        return all(sizes.get(name) == entry.size for name, entry in files.items())

    def remove(self, names: Iterable[str]) -> None:
        """Remove some files of a folder that is not committed."""
        self._store.delete([self._prefix + name for name in names])

    def withdraw(self) -> None:
        """Take the manifest away: from here on the folder does not exist, and its files are leftovers."""
        self.remove([MANIFEST])

    def delete(self, *, on_withdrawn: Callable[[], None] = lambda: None) -> None:
        """Delete the folder, manifest first; `on_withdrawn` is called when it is gone and the files still stand."""
        self.withdraw()
        on_withdrawn()
        self.remove(self.sizes())

    def _has_manifest(self, content: Mapping[str, Any]) -> bool:
        try:
            return json_object(self._store.read(self._prefix + MANIFEST, max_bytes=MANIFEST_BYTES)[0]) == content
        except (NotFoundError, DataError, ValueError):
            return False


class LocalFolder:
    """A folder on the local disk."""

    def __init__(self, path: Path) -> None:
        """Nothing is looked at yet."""
        self.path = path

    @property
    def manifest_path(self) -> Path:
        """Where the manifest stands, once the folder is committed."""
        return self.path / MANIFEST

    def is_committed(self) -> bool:
        """Whether there is a manifest; it is not verified."""
        return self.manifest_path.is_file()

    def manifest(self, is_ours: Callable[[Facts], bool]) -> Manifest:
        """The manifest of a committed folder.

        Raises:
            NotFoundError: the folder is not committed, or cannot be read.
            DataError: the manifest is damaged, or its facts are not ours.
        """
        try:
            with self.manifest_path.open("rb") as file:
                data = file.read(MANIFEST_BYTES + 1)
        except OSError as error:
            raise NotFoundError(f"{self.manifest_path}: {error.strerror or error}") from error
        if len(data) > MANIFEST_BYTES:
            raise DataError(f"{self.manifest_path}: larger than the {MANIFEST_BYTES:,} bytes of a manifest; delete it")
        return _parsed(data, is_ours, where=str(self.path))

    @contextlib.contextmanager
    def commit(self, facts: Facts) -> Iterator[dict[str, FileEntry]]:
        """Entries to be filled while the files are written; the end of the block writes them as the manifest.

        Raises:
            LocalDiskError: the manifest cannot be written.
        """
        files: dict[str, FileEntry] = {}
        yield files
        with whole_file(self.manifest_path) as file:
            file.write(json_bytes(Manifest(facts=facts, files=files).content()))

    def write(self, name: str, content: Callable[[], bytes]) -> FileEntry:
        """Write one file whole. It is verified when it is read, and so need not wait for the disk."""
        with whole_file(self.path / name, durable=False) as file:
            file.write(content())
        return FileEntry(size=file.size, sha256=file.sha256)

    def damaged(self, files: Mapping[str, FileEntry], should_stop: Callable[[], bool]) -> list[str]:
        """The names of the files that are missing, or are not what their entries say.

        Raises:
            StopRequestedError: asked to stop while files are read.
        """

        def is_whole(name: str) -> bool:
            path, entry = self.path / name, files[name]
            try:
                return path.stat().st_size == entry.size and file_sha256(path, should_stop) == entry.sha256
            except OSError:
                return False

        with ThreadPoolExecutor(_WORKERS) as pool:
            return [name for name, whole in zip(files, pool.map(is_whole, files), strict=True) if not whole]

    def withdraw(self) -> None:
        """Take the manifest away: from here on the folder does not exist, and its files are leftovers."""
        with contextlib.suppress(OSError):
            self.manifest_path.unlink()

    def delete(self) -> None:
        """Delete the folder, manifest first."""
        self.withdraw()
        shutil.rmtree(self.path, ignore_errors=True)


def plain_name(name: str) -> str:
    """The name itself, when it is a file's in the folder or in a folder directly inside.

    Names may come from a bucket: they must not reach out of the folder that they are written to.

    Raises:
        DataError: it could.
    """
    if not _NAME.fullmatch(name):
        raise DataError(f"{name!r} is no plain file name")
    return name


def total_bytes(files: Mapping[str, FileEntry]) -> int:
    """Bytes of all these files."""
    return sum(entry.size for entry in files.values())


def refuse_if_full(folder: Path, *, needed_bytes: int) -> None:
    """Make a local folder, and see that it has room.

    Raises:
        LocalDiskError: it has not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise LocalDiskError(f"{folder}: {needed_bytes:,} bytes should be free, {free:,} are; give it more room")


def _parsed(data: bytes, is_ours: Callable[[Facts], bool], *, where: str) -> Manifest:
    try:
        facts = json_object(data)
        files = {plain_name(name): _entry(entry) for name, entry in facts.pop("files").items()}
    except (DataError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where}/{MANIFEST}: damaged ({error})") from error
    if not files or not is_ours(facts):
        raise DataError(f"{where}/{MANIFEST}: damaged (it is not what is written for this folder)")
    return Manifest(facts=facts, files=files)


def _entry(facts: Mapping[str, Any]) -> FileEntry:
    entry = FileEntry(size=facts["size"], sha256=facts["sha256"])
    if type(entry.size) is not int or entry.size < 0 or not _SHA256.fullmatch(entry.sha256) or facts != asdict(entry):
        raise ValueError(f"{facts!r:.200} is no size and sha256")
    return entry


def _progress(on_progress: Callable[[int, int], None], before: int, of: int, done: int, _of: int) -> None:
    """One file's progress as the whole download's."""
    on_progress(before + done, of)
