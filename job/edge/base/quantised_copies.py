"""Copies of base models in 4 bits, in the work folder and in a store for other machines; each file is verified.

models/quantised/{base}-{form}/
  config.json, tokenizer, licence ...   as the base has them
  model-00001.safetensors ...           its weights in 4 bits, and what is not in 4 bits
  MANIFEST.json                         what it is a copy of; without it there is no copy
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from job.core.errors import DataError, JobError, NotFoundError, StopRequestedError
from job.core.recipe.schema import is_hub_id
from job.edge.base import files as model_files
from job.edge.base.fetching import BaseModel, BaseModelIdentity, OnProgress
from job.edge.store.folder import Facts, FileEntry, LocalFolder, StoredFolder, refuse_if_full, total_bytes
from job.edge.store.lanes import Lanes
from job.edge.store.objects import ObjectStore
from job.edge.store.opening import local_path
from job.edge.store.whole_files import remove_dead

log = structlog.get_logger(__name__)
Files = Iterable[tuple[str, Callable[[], bytes]]]
"""Name, and what makes the content; called on several threads."""
_FORMAT = 2
"""Those of format 1 may hold tensors that their base lacked."""
_KEPT = 3
"""Copies of one base that stay in the work folder, those used last: it has another one on each kind of GPU, and after
each update of the libraries that quantise."""
_SETTLE_SECONDS = 60.0
"""How long files that are being written are waited for when another one failed."""


class QuantisedCopy:
    """The copy of one base in one form. It only saves time: whatever fails with it costs a warning, never the job."""

    def __init__(
        self,
        base: BaseModelIdentity,
        form: Mapping[str, str],
        *,
        models_folder: Path,
        store: ObjectStore | None,
        should_stop: Callable[[], bool],
    ) -> None:
        """Nothing is looked at yet.

        Args:
            base: what it is a copy of.
            form: all that decides what the base becomes in 4 bits, to the bit.
            models_folder: keeps copies for later runs on this machine.
            store: keeps them for other machines; None: nothing does.
            should_stop: polled between files and inside large ones; then StopRequestedError is raised.
        """
        # Folders are named by their content alone: the same base may stand elsewhere on the next machine.
        local = not is_hub_id(base.source) and local_path(base.source) is not None
        source = {"source": "a folder" if local else base.source, "revision": base.revision}
        self._base = base
        self._facts: Facts = {"format": _FORMAT, "base": source, "form": dict(form)}
        self._name = f"{_short_hash(source)}-{_short_hash(self._facts)}"
        self._here = LocalFolder(models_folder / "quantised" / self._name)
        self._stored = None if store is None else StoredFolder(store, self._name)
        self._should_stop = should_stop
        self._files: Mapping[str, FileEntry] = {}
        """The files of the copy that was found; empty: none was."""

    @property
    def folder(self) -> Path:
        """Where the copy stands on this machine, once there is one."""
        return self._here.path

    # --- reading -----------------------------------------------------------------------------------------------------

    def find(self) -> Path | None:
        """The folder with the copy's small files (configuration, tokenizer); None: no copy here, nor in the store."""
        self._files = self._attempt(self._files_here) or self._attempt(self._files_stored) or {}
        small = model_files.small_files(self._files)
        return self.folder if self._files and self._is_ready(small, lambda _done, _of: None) else None

    def bring(self, on_progress: OnProgress) -> BaseModel | None:
        """All of the copy that `find` found, verified; None: there is none, or it is damaged."""
        if not self._files or not self._is_ready(self._files, on_progress):
            return None
        if not self._here.is_committed() and self._attempt(self._commit_here) is None:
            return None
        with contextlib.suppress(OSError):
            os.utime(self._here.manifest_path)  # the copies used last stay
        size = total_bytes(self._files)
        log.info("quantised_copy", folder=str(self.folder), bytes=size, message="it is used in place of the weights")
        licence = model_files.licence(self.folder)
        return BaseModel(folder=self.folder, identity=self._base, licence=licence, bytes=size, quantised=True)

    def _is_ready(self, names: Collection[str], on_progress: OnProgress) -> bool:
        """Whether these files stand here, whole: verified, or brought from the store."""
        missing = self._here.damaged({name: self._files[name] for name in names}, self._should_stop)
        if missing and self._here.is_committed():
            log.warning("quantised_copy_damaged", folder=str(self.folder), files=missing)
            self._here.withdraw()
        if not missing or self._attempt(lambda: self._download(missing, on_progress)):
            return True
        self._files = {}
        return False

    def _files_here(self) -> Mapping[str, FileEntry] | None:
        try:
            return self._here.manifest(self._is_ours).files
        except NotFoundError:
            return None
        except DataError:
            self._here.withdraw()
            raise

    def _files_stored(self) -> Mapping[str, FileEntry] | None:
        if self._stored is None:
            return None
        try:
            return self._stored.manifest(self._is_ours).files
        except NotFoundError:
            return None

    def _is_ours(self, facts: Facts) -> bool:
        return facts == self._facts

    def _download(self, names: Collection[str], on_progress: OnProgress) -> bool:
        if self._stored is None:
            return False
        wanted = {name: self._files[name] for name in names}
        refuse_if_full(self.folder, needed_bytes=total_bytes(wanted))
        try:
            self._stored.refuse_other_sizes(wanted)
            self._stored.download(wanted, self.folder, should_stop=self._should_stop, on_progress=on_progress)
        except (DataError, NotFoundError):
            # Whoever makes the next copy puts all of its files there again.
            self._stored.withdraw()
            raise
        return True

    # --- writing -----------------------------------------------------------------------------------------------------

    def keep(self, files: Files, *, beside: Path, needed_bytes: int, on_beat: Callable[[], None]) -> None:
        """Write the copy, here and into the store.

        Two that write the same copy at once write the same files, each of which appears whole.

        Args:
            files: the weights in 4 bits, their index, and the configuration that says so.
            beside: the base's folder, for its tokenizer and all else that is small.
            needed_bytes: about what the files hold.
            on_beat: called after each file.
        """
        if self._attempt(lambda: self._write(files, beside, needed_bytes, on_beat)) is None:
            if not self._here.is_committed():
                self._here.delete()  # the room is needed for other things
            return
        log.info("quantised_copy", folder=str(self.folder), bytes=needed_bytes, message="it was made for later starts")
        self._forget_old_ones()
        if (stored := self._stored) is not None:
            self._attempt(lambda: self._upload(stored, on_beat))

    def _write(self, files: Files, beside: Path, needed_bytes: int, on_beat: Callable[[], None]) -> bool:
        # As much again stays free: checkpoints and data come first.
        refuse_if_full(self.folder, needed_bytes=2 * needed_bytes)
        remove_dead(self.folder)
        small = model_files.small_files(model_files.present_files(beside))
        # The configuration and the index are among both: the copy's own count.
        every = {name: (beside / name).read_bytes for name in small} | dict(files)
        what = "a copy of the base in 4 bits was written"
        with (
            self._here.commit(self._facts) as entries,
            Lanes(what, self._should_stop, settle_seconds=_SETTLE_SECONDS) as lanes,
        ):
            written = lanes.in_order(partial(self._here.write, name, make) for name, make in every.items())
            for name, entry in zip(every, written, strict=True):
                entries[name] = entry
                on_beat()
        self._files = entries
        return True

    def _commit_here(self) -> bool:
        with self._here.commit(self._facts) as entries:
            entries.update(self._files)
        return True

    def _upload(self, stored: StoredFolder, on_beat: Callable[[], None]) -> bool:
        # Not create-only: whoever made the same copy meanwhile wrote the same there.
        with stored.commit(self._facts, create_only=False) as entries:
            for name, entry in self._files.items():
                entries[name] = stored.upload(self.folder / name, name, should_stop=self._should_stop)
                if entries[name] != entry:
                    raise DataError(f"{self.folder / name}: changed while it was sent to {stored.uri}")
                on_beat()
        log.info("quantised_copy", uri=stored.uri, message="it was put there for other machines")
        return True

    # --- both --------------------------------------------------------------------------------------------------------

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """What the action gives; None, and a warning, where it fails."""
        try:
            return action()
        except StopRequestedError:
            raise
        except (JobError, OSError) as error:
            log.warning("quantised_copy_failed", reason=str(error), message="the job goes on without it")
            return None

    def _forget_old_ones(self) -> None:
        others = (path for path in self.folder.parent.glob(f"{self._name.partition('-')[0]}-*") if path != self.folder)
        # Ours is the one used last, also on a machine whose clock was set back meanwhile.
        for folder in sorted(map(LocalFolder, others), key=_used_at, reverse=True)[_KEPT - 1 :]:
            folder.delete()


def _used_at(folder: LocalFolder) -> float:
    """When a copy was used last, in Unix seconds; one that is not whole counts from its last file."""
    for path in (folder.manifest_path, folder.path):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _short_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
