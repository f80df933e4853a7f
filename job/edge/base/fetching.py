"""Fetches the base model from the hub, a local folder or a store; the weights come last and make a copy complete."""

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from job.core.base import quantisation
from job.core.base.promises import TensorHeader
from job.core.errors import LocalDiskError, NotFoundError, UsageError
from job.core.recipe.schema import is_hub_id
from job.edge.base import files as model_files
from job.edge.base import headers
from job.edge.base import places as model_places
from job.edge.base.hub import HUB_PATIENCE, HubRepo
from job.edge.base.places import Place
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import local_path
from job.edge.store.patience import STORE_PATIENCE, Patience

log = structlog.get_logger(__name__)
OnProgress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes in all, from several threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelIdentity:
    """Which model exactly: two runs with the same identity train on the same weights."""

    source: str
    """As in the recipe: a hub id, a folder, or a store's prefix."""
    revision: str
    """The commit for a hub id; else a sha256 over the names and contents (local) or names, ETags and sizes (store)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """A base model that stands on the local disk, ready to be loaded."""

    folder: Path
    identity: BaseModelIdentity
    licence: str | None
    """From the model's card, or the name of its licence file; None when there is neither."""
    bytes: int
    """Size of the files that are loaded, weights included."""
    quantised: bool = False
    """It is a copy in 4 bits, which a run made earlier."""


def _never() -> bool:
    return False


def identify(
    source: str,
    revision: str | None,
    *,
    settings: StoreSettings,
    complete: bool = True,
    should_stop: Callable[[], bool] = _never,
) -> BaseModelIdentity:
    """Determine which model a recipe means, before anything large is downloaded; a local folder is read once.

    Args:
        source: a hub id, a folder, or a store's prefix.
        revision: the commit of a hub id, else None.
        settings: of the store.
        complete: False where no weights need to be there, since none will be loaded.
        should_stop: polled while a folder is read.

    Raises:
        UsageError: no full commit for a hub id, or one for anything else; weights as pickles only, or as GGUF.
        NotFoundError: no such folder or prefix, or no model in it.
    """
    if source.lower().endswith(".gguf"):
        raise quantisation.foreign("GGUF", source=source, named=())
    if is_hub_id(source):
        if revision is None or len(revision) != 40 or set(revision) - set("0123456789abcdef"):  # noqa: PLR2004 SHA-1
            raise UsageError(
                f"model.revision: {revision!r} is no full commit (40 hex digits) of {source}; "
                "a name like `main` moves, so copy the commit from the model's page"
            )
        return BaseModelIdentity(source=source, revision=revision)
    if revision is not None:
        raise UsageError(f"model.revision: only a hub id has one, and {source} is none; remove the key")
    if (folder := local_path(source)) is not None:
        return BaseModelIdentity(
            source=source,
            revision=model_places.content_hash(folder, source=source, complete=complete, should_stop=should_stop),
        )
    _store, objects = model_places.look_into_store(source, settings, complete=complete)
    return BaseModelIdentity(source=source, revision=model_places.objects_hash(objects))


def fetch(
    identity: BaseModelIdentity,
    *,
    models_folder: Path,
    settings: StoreSettings,
    should_stop: Callable[[], bool],
    on_progress: OnProgress | None = None,
    weights: bool = True,
    complete: bool = True,
    patience: Patience | None = None,
) -> BaseModel:
    """Bring the model to the local disk; what can be refused is refused before the weights move.

    Args:
        identity: from `identify`.
        models_folder: keeps copies for later runs; a local folder is used where it stands.
        settings: of the store, where the source is a store's prefix.
        should_stop: polled between files and inside large ones.
        on_progress: follows the weights.
        weights: False for the small files only (configuration, tokenizer): enough to check and to plan.
        complete: as in `identify`.
        patience: with a hub or store that fails; None: the one made for it.

    Raises:
        JobError: refused, not found, denied, unavailable, no room, or stopped; a later call goes on with what is there.
    """
    source = identity.source
    folder = _ready_copy(identity, models_folder)
    if folder is None:
        _make_folder(models_folder)
        place = _place(identity, models_folder, settings, should_stop, complete=complete, patience=patience)
        folder = _bring(place, source=source, weights=weights, complete=complete, on_progress=on_progress)
    else:
        _refuse_strange(folder, source=source)
    names = model_files.present_files(folder)
    shards = model_files.weight_files(folder, names, source=source) if weights else []
    model_files.refuse_broken_weights(folder, shards, source=source)
    return BaseModel(
        folder=folder,
        identity=identity,
        licence=model_files.licence(folder),
        bytes=sum(names[name] for name in [*model_files.small_files(names), *shards]),
    )


def is_here(identity: BaseModelIdentity, models_folder: Path) -> bool:
    """Whether nothing would have to be fetched: a local folder, or a copy that is whole."""
    return local_path(identity.source) is not None or _ready_copy(identity, models_folder) is not None


def read_headers(
    identity: BaseModelIdentity,
    *,
    models_folder: Path,
    settings: StoreSettings,
    should_stop: Callable[[], bool],
    patience: Patience | None = None,
) -> dict[str, TensorHeader]:
    """Every tensor of the model, by name, before its weights are brought here: only the headers of the files are read.

    Args:
        identity: from `identify`.
        models_folder: keeps copies for later runs; one that is whole is read in place of the source.
        settings: of the store, where the source is a store's prefix.
        should_stop: polled while a hub or a store is asked.
        patience: with a hub or store that fails; None: the one made for it.

    Raises:
        JobError: as `fetch`; a header is broken.
    """
    source, folder = identity.source, _ready_copy(identity, models_folder)
    place: Place
    if folder is None:
        place = _place(identity, models_folder, settings, should_stop, complete=True, patience=patience)
        files = place.files()
        folder = _bring_small_files(place, files, source=source, complete=True)
    else:
        place = model_places.InFolder(folder=folder)
        files = place.files()
    return headers.read_headers(_weights(folder, files, source=source), place.read_part, source=source)


def _bring(place: Place, *, source: str, weights: bool, complete: bool, on_progress: OnProgress | None) -> Path:
    files = place.files()
    folder = _bring_small_files(place, files, source=source, complete=complete)
    if weights:
        wanted = _weights(folder, files, source=source)
        progress = _Progress(sum(wanted.values()), _here_bytes(folder, wanted), on_progress)
        _refuse_if_full(folder, needed_bytes=progress.left_bytes, source=source)
        log.info("base_model_fetch", source=source, files=len(wanted), bytes=sum(wanted.values()))
        place.bring(wanted, on_bytes=progress)
    return folder


def _bring_small_files(place: Place, files: Mapping[str, int], *, source: str, complete: bool) -> Path:
    model_files.refuse_unusable(files, source=source, complete=complete)
    model_files.refuse_large(files, source=source)
    folder = place.bring(model_files.wanted_files(files), on_bytes=lambda _count: None)
    _refuse_strange(folder, source=source)
    return folder


def _refuse_strange(folder: Path, *, source: str) -> None:
    # Of the files as they came: a hub's list of their sizes is not all that they are.
    model_files.refuse_large(model_files.present_files(folder), source=source)
    model_files.refuse_unknown_architecture(folder, source=source)
    model_files.four_bits(folder, source=source)


def _weights(folder: Path, files: Mapping[str, int], *, source: str) -> dict[str, int]:
    return {name: files[name] for name in model_files.weight_files(folder, files, source=source)}


def _here_bytes(folder: Path, wanted: Mapping[str, int]) -> int:
    return sum(size for name, size in wanted.items() if (folder / name).is_file())


def _place(
    identity: BaseModelIdentity,
    models_folder: Path,
    settings: StoreSettings,
    should_stop: Callable[[], bool],
    *,
    complete: bool,
    patience: Patience | None,
) -> Place:
    if is_hub_id(identity.source):
        repo = HubRepo(
            repo_id=identity.source,
            revision=identity.revision,
            should_stop=should_stop,
            patience=patience or HUB_PATIENCE,
        )
        return model_places.OnHub(repo=repo, cache=model_places.hub_cache(models_folder))
    if (folder := local_path(identity.source)) is not None:
        return model_places.InFolder(folder=folder)
    store, objects = model_places.look_into_store(
        identity.source, settings, complete=complete, patience=patience or STORE_PATIENCE
    )
    if model_places.objects_hash(objects) != identity.revision:
        raise NotFoundError(
            f"{identity.source}: the objects changed since this run began with {identity.revision[:12]}; "
            "put the old ones back, or start a new run"
        )
    copy = models_folder / identity.revision
    return model_places.InStore(store=store, objects=objects, copy=copy, should_stop=should_stop)


def _ready_copy(identity: BaseModelIdentity, models_folder: Path) -> Path | None:
    """A copy that needs nothing more, so that a run on this machine starts without any network."""
    if is_hub_id(identity.source):
        from huggingface_hub import constants

        for cache in (model_places.hub_cache(models_folder), Path(constants.HF_HUB_CACHE)):
            folder = model_places.snapshot(identity.source, identity.revision, cache)
            if folder is not None and model_files.is_complete(folder, source=identity.source):
                return folder
        return None
    copy = models_folder / identity.revision
    return copy if model_places.is_marked_complete(copy) else None


class _Progress:
    """Counts bytes from several threads; a part that had to be fetched twice is not counted beyond the whole."""

    def __init__(self, total_bytes: int, here_bytes: int, on_progress: OnProgress | None) -> None:
        self._total, self._done, self._on_progress = total_bytes, here_bytes, on_progress
        self._lock = threading.Lock()

    @property
    def left_bytes(self) -> int:
        return self._total - self._done

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done = min(self._total, self._done + count)
            done = self._done
        if self._on_progress is not None:
            self._on_progress(done, self._total)


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
