"""Fetches the base model from the hub, a local folder or a store; the weights come last and make a copy complete."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import structlog

from job.core.errors import DeniedError, LocalDiskError, NotFoundError, StopRequestedError, UsageError
from job.core.recipe import is_hub_id
from job.edge import model_files
from job.edge.hub import HubRepo, Patience
from job.edge.objects import ObjectStore, StoredObject, StoreSettings
from job.edge.whole_files import whole_file

_MARKER = ".complete.json"
_CHUNK_BYTES = 1 << 20
_WORKERS = 8

log = structlog.get_logger(__name__)

OnProgress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes in all, from several threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelIdentity:
    """Which model exactly: two runs with the same identity train on the same weights."""

    source: str
    """As in the recipe: a hub id, a folder, or an s3:// prefix."""
    revision: str
    """The commit for a hub id; else a sha256 over the names and contents (local) or names, ETags and sizes (store)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A base model that stands on the local disk, ready to be loaded."""

    folder: Path
    identity: BaseModelIdentity
    licence: str | None
    """From the model's card, or the name of its licence file; None when neither says."""
    bytes: int
    """Of the files that are loaded, weights included."""


class _Place(Protocol):
    """Where a model stands; `bring` returns the local folder that then holds the named files."""

    def files(self) -> Mapping[str, int]: ...

    def bring(self, names: Collection[str], *, on_bytes: Callable[[int], None]) -> Path: ...


def _never() -> bool:
    return False


def identify(
    source: str, revision: str | None, *, settings: StoreSettings, should_stop: Callable[[], bool] = _never
) -> BaseModelIdentity:
    """Say which model a recipe means, before anything large is downloaded; a local folder is read once.

    Raises:
        UsageError: no full commit for a hub id, or one for anything else; weights as pickles only.
        NotFoundError: no such folder or prefix, or no model in it.
    """
    if is_hub_id(source):
        if revision is None or len(revision) != 40 or set(revision) - set("0123456789abcdef"):  # noqa: PLR2004 SHA-1
            raise UsageError(
                f"model.revision: {revision!r} is no full commit (40 hex digits) of {source}; "
                "a name like `main` moves, so copy the commit from the model's page"
            )
        return BaseModelIdentity(source=source, revision=revision)
    if revision is not None:
        raise UsageError(f"model.revision: only a hub id has one, and {source} is none; remove the key")
    if (folder := _local_folder(source)) is not None:
        return BaseModelIdentity(source=source, revision=_content_hash(folder, source=source, should_stop=should_stop))
    _store, objects = _look_into_store(source, settings)
    return BaseModelIdentity(source=source, revision=_objects_hash(objects))


def fetch(
    identity: BaseModelIdentity,
    *,
    models_folder: Path,
    settings: StoreSettings,
    should_stop: Callable[[], bool],
    on_progress: OnProgress | None = None,
    weights: bool = True,
    patience: Patience | None = None,
) -> BaseModel:
    """Bring the model to the local disk; what can be refused is refused before the weights move.

    Args:
        identity: from `identify`.
        models_folder: keeps copies for later runs; a local folder is used where it stands.
        settings: of the store, for an s3:// prefix.
        should_stop: polled between files and inside large ones.
        on_progress: follows the weights.
        weights: False for the small files only (configuration, tokenizer): enough to check and to plan.
        patience: with a hub that fails.

    Raises:
        JobError: refused, not found, denied, unavailable, no room, or stopped; a later call goes on with what is there.
    """
    source = identity.source
    folder = _ready_copy(identity, models_folder)
    if folder is None:
        _make_folder(models_folder)
        place = _place(identity, models_folder, settings, should_stop, patience or Patience())
        folder = _bring(place, source=source, weights=weights, on_progress=on_progress)
    else:
        model_files.refuse_unknown_architecture(folder, source=source)
    names = model_files.present_files(folder)
    shards = model_files.weight_files(folder, names, source=source) if weights else []
    model_files.refuse_broken_weights(folder, shards, source=source)
    return BaseModel(
        folder=folder,
        identity=identity,
        licence=model_files.licence(folder),
        bytes=sum(names[name] for name in [*model_files.small_files(names), *shards]),
    )


def _bring(place: _Place, *, source: str, weights: bool, on_progress: OnProgress | None) -> Path:
    files = place.files()
    model_files.refuse_unusable(files, source=source)
    folder = place.bring(model_files.small_files(files), on_bytes=lambda _count: None)
    model_files.refuse_unknown_architecture(folder, source=source)
    if weights:
        shards = model_files.weight_files(folder, files, source=source)
        wanted = {name: files[name] for name in shards}
        here = sum(size for name, size in wanted.items() if (folder / name).is_file())
        progress = _Progress(sum(wanted.values()), here, on_progress)
        _refuse_if_full(folder, needed_bytes=progress.left_bytes, source=source)
        log.info("base_model_fetch", source=source, files=len(shards), bytes=sum(wanted.values()))
        place.bring(shards, on_bytes=progress)
    return folder


def _place(
    identity: BaseModelIdentity,
    models_folder: Path,
    settings: StoreSettings,
    should_stop: Callable[[], bool],
    patience: Patience,
) -> _Place:
    if is_hub_id(identity.source):
        repo = HubRepo(repo_id=identity.source, revision=identity.revision, should_stop=should_stop, patience=patience)
        return _OnHub(repo=repo, cache=_hub_cache(models_folder))
    if (folder := _local_folder(identity.source)) is not None:
        return _InFolder(folder=folder)
    store, objects = _look_into_store(identity.source, settings)
    if _objects_hash(objects) != identity.revision:
        raise NotFoundError(
            f"{identity.source}: the objects changed since this run began with {identity.revision[:12]}; "
            "put the old ones back, or start a new run"
        )
    copy = models_folder / identity.revision
    return _InStore(store=store, objects=objects, copy=copy, should_stop=should_stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnHub:
    repo: HubRepo
    cache: Path

    def files(self) -> Mapping[str, int]:
        return self.repo.files()

    def bring(self, names: Collection[str], *, on_bytes: Callable[[int], None]) -> Path:
        self.repo.bring(names, cache=self.cache, on_bytes=on_bytes)
        folder = _snapshot(self.repo.repo_id, self.repo.revision, self.cache)
        assert folder is not None, "the library keeps a snapshot of what it downloaded"
        return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class _InFolder:
    folder: Path

    def files(self) -> Mapping[str, int]:
        return model_files.present_files(self.folder)

    def bring(self, names: Collection[str], *, on_bytes: Callable[[int], None]) -> Path:
        del names, on_bytes  # all of them stand here already
        return self.folder


@dataclass(frozen=True, slots=True, kw_only=True)
class _InStore:
    store: ObjectStore
    objects: Mapping[str, StoredObject]
    copy: Path
    should_stop: Callable[[], bool]

    def files(self) -> Mapping[str, int]:
        return {name: stored.size for name, stored in self.objects.items()}

    def bring(self, names: Collection[str], *, on_bytes: Callable[[int], None]) -> Path:
        for name in names:
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
        if any(name.endswith(".safetensors") for name in names):
            self._mark_complete()
        return self.copy

    def _mark_complete(self) -> None:
        here = model_files.present_files(self.copy)
        sizes = {name: size for name, size in here.items() if name in self.objects}
        with whole_file(self.copy / _MARKER) as marker:
            marker.write(json.dumps(sizes).encode())


def _counting(on_bytes: Callable[[int], None]) -> Callable[[int, int], None]:
    """From `done of all` to `so many more`."""
    told = 0

    def tell(done: int, _of: int) -> None:
        nonlocal told
        on_bytes(done - told)
        told = done

    return tell


def _ready_copy(identity: BaseModelIdentity, models_folder: Path) -> Path | None:
    """A copy that needs nothing more, so that a run on this machine starts without any network."""
    if is_hub_id(identity.source):
        from huggingface_hub import constants

        for cache in (_hub_cache(models_folder), Path(constants.HF_HUB_CACHE)):
            folder = _snapshot(identity.source, identity.revision, cache)
            if folder is not None and model_files.is_complete(folder, source=identity.source):
                return folder
        return None
    copy = models_folder / identity.revision
    return copy if _is_marked_complete(copy) else None


def _is_marked_complete(copy: Path) -> bool:
    try:
        sizes = json.loads((copy / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    here = model_files.present_files(copy)
    return isinstance(sizes, dict) and all(here.get(name) == size for name, size in sizes.items())


def _hub_cache(models_folder: Path) -> Path:
    return models_folder / "hub"


def _snapshot(repo_id: str, revision: str, cache: Path) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, "config.json", cache_dir=cache, revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _local_folder(source: str) -> Path | None:
    """The folder that a source names, None for a store."""
    parts = urlsplit(source)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return None if "://" in source else Path(source)


def _content_hash(folder: Path, *, source: str, should_stop: Callable[[], bool]) -> str:
    if not folder.is_dir():
        raise NotFoundError(f"{source}: no such folder; correct model.base (a hub id is written owner/name)")
    try:
        names = model_files.present_files(folder)
        model_files.refuse_unusable(names, source=source)
        wanted = model_files.identifying_files(names)
        with ThreadPoolExecutor(_WORKERS) as pool:
            hashes = list(pool.map(lambda name: _file_hash(folder / name, should_stop), wanted))
    except PermissionError as error:
        raise DeniedError(f"{source}: {error.filename} cannot be read; correct its permissions") from error
    return _hash_of(f"{name} {digest}" for name, digest in zip(wanted, hashes, strict=True))


def _file_hash(path: Path, should_stop: Callable[[], bool]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            _raise_if(should_stop)
            digest.update(chunk)
    return digest.hexdigest()


def _look_into_store(source: str, settings: StoreSettings) -> tuple[ObjectStore, Mapping[str, StoredObject]]:
    from job.edge.storage import open_store

    store = open_store(source, settings)
    keys = [entry.key for entry in store.list()]
    if not keys:
        raise NotFoundError(f"{source}: no objects under this prefix; correct model.base")
    model_files.refuse_unusable(keys, source=source)
    wanted = {*model_files.small_files(keys), *model_files.identifying_files(keys)}
    with ThreadPoolExecutor(_WORKERS) as pool:
        return store, {stored.key: stored for stored in pool.map(store.stat, sorted(wanted))}


def _objects_hash(objects: Mapping[str, StoredObject]) -> str:
    names = model_files.identifying_files(objects)
    return _hash_of(f"{name} {objects[name].etag} {objects[name].size}" for name in names)


def _hash_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Progress:
    """Counts bytes from several threads; a part that had to be fetched twice is not counted beyond the whole."""

    def __init__(self, total_bytes: int, here_bytes: int, on_progress: OnProgress | None) -> None:
        self._total, self._done, self._tell = total_bytes, here_bytes, on_progress
        self._lock = threading.Lock()

    @property
    def left_bytes(self) -> int:
        return self._total - self._done

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done = min(self._total, self._done + count)
            done = self._done
        if self._tell is not None:
            self._tell(done, self._total)


def _refuse_if_full(folder: Path, *, needed_bytes: int, source: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise LocalDiskError(
            f"{source}: {needed_bytes:,} bytes are still to come, {folder} has room for {free:,}; "
            "give the work folder more room, or name another one with --workdir"
        )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalDiskError(
            f"{folder}: cannot be made ({error.strerror}); name another work folder with --workdir"
        ) from error


def _raise_if(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise StopRequestedError("stopped while the base model was read; files that are complete are kept")
