"""The places a base model can stand in: the hub, a local folder, a store; each lists its files and brings some here."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from job.core.errors import DeniedError, NotFoundError, StopRequestedError
from job.edge.base import files as model_files
from job.edge.base.hub import HubRepo
from job.edge.relative_paths import located, relative_note
from job.edge.store.objects import ObjectStore, StoredObject, StoreSettings
from job.edge.store.opening import open_store
from job.edge.store.patience import STORE_PATIENCE, Patience
from job.edge.store.whole_files import file_sha256, whole_file

_MARKER = ".complete.json"
_WORKERS = 8


class Place(Protocol):
    """Where a model stands."""

    def files(self) -> Mapping[str, int]:
        """Name -> bytes."""
        ...

    def bring(self, sizes: Mapping[str, int], *, on_bytes: Callable[[int], None]) -> Path:
        """The local folder that then holds these files, name -> bytes; `on_bytes` gets the number of new bytes."""
        ...

    def read_part(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of a file from `start` on, without bringing all of it; called on several threads."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OnHub:
    """One commit on the hub."""

    repo: HubRepo
    cache: Path

    def files(self) -> Mapping[str, int]:
        """Name -> bytes."""
        return self.repo.files()

    def bring(self, sizes: Mapping[str, int], *, on_bytes: Callable[[int], None]) -> Path:
        """The local folder that then holds these files."""
        self.repo.bring(sizes, cache=self.cache, on_bytes=on_bytes)
        folder = snapshot(self.repo.repo_id, self.repo.revision, self.cache)
        assert folder is not None, "the library keeps a snapshot of what it downloaded"
        return folder

    def read_part(self, name: str, start: int, length: int) -> bytes:
        """A piece of a file of the commit."""
        return self.repo.read_part(name, start, length)


@dataclass(frozen=True, slots=True, kw_only=True)
class InFolder:
    """A local folder, used where it stands."""

    folder: Path

    def files(self) -> Mapping[str, int]:
        """Name -> bytes."""
        return model_files.present_files(self.folder)

    def bring(self, sizes: Mapping[str, int], *, on_bytes: Callable[[int], None]) -> Path:
        """The local folder that then holds these files."""
        del sizes, on_bytes  # all of them stand here already
        return self.folder

    def read_part(self, name: str, start: int, length: int) -> bytes:
        """A piece of a file."""
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return file.read(length)


@dataclass(frozen=True, slots=True, kw_only=True)
class InStore:
    """Objects under one prefix of a store, copied to a folder named after their hash."""

    store: ObjectStore
    objects: Mapping[str, StoredObject]
    copy: Path
    should_stop: Callable[[], bool]

    def files(self) -> Mapping[str, int]:
        """Name -> bytes."""
        return {name: stored.size for name, stored in self.objects.items()}

    def bring(self, sizes: Mapping[str, int], *, on_bytes: Callable[[int], None]) -> Path:
        """The local folder that then holds these files."""
        for name in sizes:
            stored, target = self.objects[name], self.copy / name
            _raise_if(self.should_stop)
            # A file appears under its name when it is whole, and the folder's name says which one it is.
            if not target.is_file() or target.stat().st_size != stored.size:
                target.parent.mkdir(parents=True, exist_ok=True)
                self.store.download(
                    stored.key,
                    target,
                    etag=stored.etag,
                    should_stop=self.should_stop,
                    on_progress=_counting(on_bytes),
                )
        if any(name.endswith(".safetensors") for name in sizes):
            self._mark_complete()
        return self.copy

    def read_part(self, name: str, start: int, length: int) -> bytes:
        """A piece of an object."""
        stored = self.objects[name]
        return self.store.read_part(stored.key, start=start, length=length, etag=stored.etag)

    def _mark_complete(self) -> None:
        here = model_files.present_files(self.copy)
        sizes = {name: size for name, size in here.items() if name in self.objects}
        with whole_file(self.copy / _MARKER) as marker:
            marker.write(json.dumps(sizes).encode())


def _counting(on_bytes: Callable[[int], None]) -> Callable[[int, int], None]:
    """Turn progress as bytes done of all into the number of new bytes."""
    counted = 0

    def count(done: int, _of: int) -> None:
        nonlocal counted
        on_bytes(done - counted)
        counted = done

    return count


def is_marked_complete(copy: Path) -> bool:
    """Whether a copy from a store has all its files, each in its full size."""
    try:
        sizes = json.loads((copy / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    here = model_files.present_files(copy)
    return isinstance(sizes, dict) and all(here.get(name) == size for name, size in sizes.items())


def hub_cache(models_folder: Path) -> Path:
    """Where copies from the hub stand, in the library's own layout."""
    return models_folder / "hub"


def snapshot(repo_id: str, revision: str, cache: Path) -> Path | None:
    """The folder of a commit in a cache, complete or not; None when it has not even a config.json."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, "config.json", cache_dir=cache, revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def content_hash(folder: Path, *, source: str, complete: bool, should_stop: Callable[[], bool]) -> str:
    """The sha256 over the names and contents of all files that can change the model, read on several threads.

    Args:
        folder: the model's.
        source: what the recipe calls it.
        complete: whether there must be weights.
        should_stop: polled while files are read.

    Raises:
        NotFoundError: no such folder, or no model in it.
        UsageError: the weights are pickles only.
        DeniedError: a file cannot be read.
    """
    if not folder.is_dir():
        raise NotFoundError(
            f"{source}: no such folder{relative_note([source])}; correct model.base (a hub id is written owner/name)"
        )
    try:
        names = model_files.present_files(folder)
        model_files.refuse_unusable(names, source=located(source), complete=complete)
        wanted = model_files.identifying_files(names)
        with ThreadPoolExecutor(_WORKERS) as pool:
            hashes = list(pool.map(lambda name: file_sha256(folder / name, should_stop), wanted))
    except PermissionError as error:
        raise DeniedError(f"{source}: {error.filename} cannot be read; correct its permissions") from error
    return _hash_of(f"{name} {digest}" for name, digest in zip(wanted, hashes, strict=True))


def look_into_store(
    source: str, settings: StoreSettings, *, complete: bool, patience: Patience = STORE_PATIENCE
) -> tuple[ObjectStore, Mapping[str, StoredObject]]:
    """The store at a prefix, and the objects there that make the model; `complete`: there must be weights.

    Raises:
        NotFoundError: no objects, or no model among them.
        UsageError: the weights are pickles only.
    """
    store = open_store(source, settings, patience=patience)
    keys = [entry.key for entry in store.list()]
    if not keys:
        raise NotFoundError(f"{source}: no objects under this prefix; correct model.base")
    model_files.refuse_unusable(keys, source=source, complete=complete)
    wanted = {*model_files.small_files(keys), *model_files.identifying_files(keys)}
    with ThreadPoolExecutor(_WORKERS) as pool:
        return store, {stored.key: stored for stored in pool.map(store.stat, sorted(wanted))}


def objects_hash(objects: Mapping[str, StoredObject]) -> str:
    """The sha256 over the names, ETags and sizes of the objects that can change the model."""
    names = model_files.identifying_files(objects)
    return _hash_of(f"{name} {objects[name].etag} {objects[name].size}" for name in names)


def _hash_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _raise_if(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise StopRequestedError("stopped while the base model was read; files that are complete are kept")
