"""Copies of base models in 4 bits, in the work folder and in a store for other machines; each file is verified.

models/quantised/{base}-{form}/
  config.json, tokenizer, licence ...   as the base has them
  model-00001.safetensors ...           its weights in 4 bits, and what is not in 4 bits
  MANIFEST.json                         what it is a copy of, sizes and sha256; written last, and no copy without it
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from job.core.errors import DataError, JobError, LocalDiskError, NotFoundError, StopRequestedError
from job.core.recipe import is_hub_id
from job.edge.base import files as model_files
from job.edge.base.fetching import BaseModel, BaseModelIdentity, OnProgress
from job.edge.run.artifacts import FileEntry, file_entry
from job.edge.store.lanes import Lanes
from job.edge.store.objects import ObjectStore
from job.edge.store.opening import local_path
from job.edge.store.whole_files import file_sha256, remove_dead, whole_file

log = structlog.get_logger(__name__)

Files = Iterable[tuple[str, Callable[[], bytes]]]
"""Name, and what makes the content; called on several threads."""

MANIFEST = "MANIFEST.json"
_FORMAT = 1
_KEPT = 3
"""Copies of one base that stay in the work folder, those used last: it has another one on each kind of GPU, and after
each update of the libraries that quantise."""
_WORKERS = 8
_SETTLE_SECONDS = 60.0
"""How long files that are being written are waited for when another one failed."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""Of a file: a manifest may come from a bucket, and must not reach out of its folder."""


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
        self._base, self._facts = base, {"format": _FORMAT, "base": source, "form": dict(form)}
        self._name = f"{_short_hash(source)}-{_short_hash(self._facts)}"
        self._store, self._should_stop = store, should_stop
        self._files: dict[str, FileEntry] = {}
        """Of the copy that was found; empty: none was."""
        self.folder = models_folder / "quantised" / self._name

    # --- reading -----------------------------------------------------------------------------------------------------

    def find(self) -> Path | None:
        """The folder with the copy's small files (configuration, tokenizer); None: there is no copy, here or there."""
        self._files = self._attempt(self._manifest_here) or self._attempt(self._manifest_there) or {}
        small = model_files.small_files(self._files)
        return self.folder if self._files and self._is_ready(small, lambda _done, _of: None) else None

    def bring(self, on_progress: OnProgress) -> BaseModel | None:
        """All of the copy that `find` found, verified; None: there is none, or it is damaged."""
        if not self._files or not self._is_ready(self._files, on_progress):
            return None
        if not (self.folder / MANIFEST).is_file() and self._attempt(self._write_manifest) is None:
            return None
        with contextlib.suppress(OSError):
            os.utime(self.folder / MANIFEST)  # the copies used last stay
        size = sum(entry.size for entry in self._files.values())
        log.info("quantised_copy", folder=str(self.folder), bytes=size, message="it is used in place of the weights")
        licence = model_files.licence(self.folder)
        return BaseModel(folder=self.folder, identity=self._base, licence=licence, bytes=size, quantised=True)

    def _is_ready(self, names: Collection[str], on_progress: OnProgress) -> bool:
        """Whether these files stand here, whole: verified, or brought from the store."""
        with ThreadPoolExecutor(_WORKERS) as pool:
            missing = [name for name, whole in zip(names, pool.map(self._is_whole, names), strict=True) if not whole]
        if missing and (self.folder / MANIFEST).is_file():
            log.warning("quantised_copy_damaged", folder=str(self.folder), files=missing)
            self._drop()
        if not missing or self._attempt(lambda: self._download(missing, on_progress)):
            return True
        self._files = {}
        return False

    def _is_whole(self, name: str) -> bool:
        path, entry = self.folder / name, self._files[name]
        try:
            if path.stat().st_size != entry.size:
                return False
            return file_sha256(path, self._should_stop) == entry.sha256
        except OSError:
            return False

    def _manifest_here(self) -> dict[str, FileEntry] | None:
        try:
            content = (self.folder / MANIFEST).read_bytes()
        except OSError:
            return None
        try:
            return self._entries(content, where=str(self.folder))
        except DataError:
            self._drop()
            raise

    def _manifest_there(self) -> dict[str, FileEntry] | None:
        if self._store is None:
            return None
        try:
            content = self._store.read(f"{self._name}/{MANIFEST}")[0]
        except NotFoundError:
            return None
        return self._entries(content, where=f"{self._store.uri}/{self._name}")

    def _entries(self, content: bytes, *, where: str) -> dict[str, FileEntry]:
        try:
            manifest = json.loads(content)
            files = {name: file_entry(facts) for name, facts in manifest.pop("files").items()}
            wrong = [name for name in files if not _NAME.fullmatch(name)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{where}: {MANIFEST} is damaged ({error})") from error
        if wrong or not files or manifest != self._facts:
            raise DataError(f"{where}: {MANIFEST} is damaged (it is not what is written for this copy)")
        return files

    def _download(self, names: Collection[str], on_progress: OnProgress) -> bool:
        if self._store is None:
            return False
        total, done = sum(self._files[name].size for name in names), 0
        _refuse_if_full(self.folder, needed_bytes=total)
        for name in names:
            entry, before = self._files[name], done
            try:
                self._store.download(
                    f"{self._name}/{name}",
                    self.folder / name,
                    sha256=entry.sha256,
                    should_stop=self._should_stop,
                    on_progress=lambda now, _of, before=before: on_progress(before + now, total),  # type: ignore[misc]
                )
            except (DataError, NotFoundError):
                # Whoever makes the next copy puts all of its files there again.
                self._store.delete([f"{self._name}/{MANIFEST}"])
                raise
            done += entry.size
        return True

    # --- writing -----------------------------------------------------------------------------------------------------

    def keep(self, files: Files, *, beside: Path, needed_bytes: int, on_beat: Callable[[], None]) -> None:
        """Write the copy, here and into the store.

        Two that write the same copy at once write the same files, each of which appears whole.

        Args:
            files: the weights in 4 bits, their index, and the configuration that says so.
            beside: the base's folder, for its tokenizer and all else that is small.
            needed_bytes: about what the files hold.
            on_beat: told after each file.
        """
        if self._attempt(lambda: self._write(files, beside, needed_bytes, on_beat)) is None:
            if not (self.folder / MANIFEST).is_file():
                shutil.rmtree(self.folder, ignore_errors=True)  # the room is needed for other things
            return
        log.info("quantised_copy", folder=str(self.folder), bytes=needed_bytes, message="it was made for later starts")
        self._forget_old_ones()
        if self._store is not None:
            self._attempt(lambda: self._upload(on_beat))

    def _write(self, files: Files, beside: Path, needed_bytes: int, on_beat: Callable[[], None]) -> bool:
        # As much again stays free: checkpoints and data come first.
        _refuse_if_full(self.folder, needed_bytes=2 * needed_bytes)
        remove_dead(self.folder)
        small = model_files.small_files(model_files.present_files(beside))
        # The configuration and the index are among both: the copy's own count.
        every = {name: (beside / name).read_bytes for name in small} | dict(files)
        what = "a copy of the base in 4 bits was written"
        with Lanes(what, self._should_stop, settle_seconds=_SETTLE_SECONDS) as lanes:
            entries = lanes.in_order(partial(self._write_file, name, make) for name, make in every.items())
            self._files = {}
            for name, entry in zip(every, entries, strict=True):
                self._files[name] = entry
                on_beat()
        self._write_manifest()
        return True

    def _write_file(self, name: str, make: Callable[[], bytes]) -> FileEntry:
        with whole_file(self.folder / name, durable=False) as file:
            file.write(make())
        return FileEntry(size=file.size, sha256=file.sha256)

    def _write_manifest(self) -> bool:
        with whole_file(self.folder / MANIFEST) as file:
            file.write(self._manifest())
        return True

    def _manifest(self) -> bytes:
        files = {name: asdict(entry) for name, entry in self._files.items()}
        return json.dumps({**self._facts, "files": files}, indent=2).encode() + b"\n"

    def _upload(self, on_beat: Callable[[], None]) -> bool:
        assert self._store is not None
        for name, entry in self._files.items():
            key = f"{self._name}/{name}"
            sent = self._store.upload(self.folder / name, key, should_stop=self._should_stop)
            if sent.sha256 != entry.sha256:
                raise DataError(f"{self.folder / name}: changed while it was sent to {self._store.uri}")
            on_beat()
        # Not create-only: whoever made the same copy meanwhile wrote the same here.
        self._store.write(f"{self._name}/{MANIFEST}", self._manifest())
        log.info("quantised_copy", uri=f"{self._store.uri}/{self._name}", message="it was put there for other machines")
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

    def _drop(self) -> None:
        """Take a damaged copy away: first what says that there is one."""
        with contextlib.suppress(OSError):
            (self.folder / MANIFEST).unlink()

    def _forget_old_ones(self) -> None:
        mine = self.folder.parent.glob(f"{self._name.partition('-')[0]}-*")
        for folder in sorted(mine, key=_used_at, reverse=True)[_KEPT:]:
            with contextlib.suppress(OSError):
                (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _used_at(folder: Path) -> float:
    """When a copy was used last; one that is not whole counts from its last file."""
    for path in (folder / MANIFEST, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _refuse_if_full(folder: Path, *, needed_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise LocalDiskError(f"{folder}: {needed_bytes:,} bytes should be free for a copy in 4 bits, {free:,} are")


def _short_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
