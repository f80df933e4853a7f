"""The dataset as token ids: what an earlier start left in the work folder, or fetched, checked and encoded anew.

cache/encoded/{content}/       named by all that decides it: the files' hashes, the data section, the tokenizer
  train.arrow validation.arrow
  MANIFEST.json                what was seen while the lines were read, and the hashes of both
  objects-{objects}.json       objects that had this content, and their hashes: to know it they need not be fetched
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import structlog
from pydantic import TypeAdapter

from job.core.crash_points import crash_point
from job.core.data.chunks import Side, in_chunks
from job.core.data.records import Tally
from job.core.data.report_data import DataObject
from job.core.errors import DataError, JobError, LocalDiskError, NotFoundError
from job.core.plan.memory import GIB
from job.core.recipe.data_section import DataSection, Fraction
from job.edge.dataset_files import DataFile, read_lines
from job.edge.host.machine import Machine, look_at_machine
from job.edge.store.folder import FileEntry, LocalFolder
from job.edge.store.whole_files import TEMPORARY, remove_dead, whole_file
from job.edge.workers import in_order
from job.stages.attempt import Phases, Worker
from job.stages.attempts.identity import Run
from job.stages.data.data_objects import Sides
from job.stages.data.data_report import Audit
from job.stages.data.sources import fetch_sources, judge_sources, new_tallies
from job.tune.data.encoded import FORMAT, STREAM_END, EncodedSet, stream_start
from job.tune.data.encoder import EncodedChunk, Encoder, rules_of

_Files = Mapping[Side, Sequence[Sequence[DataFile]]]
"""Of each source of a side."""
_TALLIES = TypeAdapter(dict[Side, list[Tally]])
log = structlog.get_logger(__name__)
_SIDES: tuple[Side, ...] = ("train", "validation")
_KEPT = 4
"""Encoded datasets that stay in the work folder, those used last."""
_LEFT_SECONDS = 3600.0
"""A folder that nobody has written to for as long, and that holds no dataset, is a leftover."""
_WORKER_BYTES = GIB // 2
"""Memory that a process which encodes may need, ..."""
_OF_MEMORY = 0.5
"""... and how much of the machine's all of them may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Both sides on the local disk, and what is known of the files that they come from."""

    sides: Mapping[Side, EncodedSet]
    audit: Audit


def encoded_data(worker: Worker, phases: Phases, run: Run, tokenizer: Any, folder: Path) -> Encoded:
    """Both sides as token ids; the folder holds the files while they are read.

    Raises:
        DataError: wrong lines.
        JobError: as stores, and processes that encode.
    """
    rules = rules_of(tokenizer, worker.recipe.data, kept=worker.recipe.evaluate.kept_fields)
    with Encoder(rules, should_stop=worker.should_stop) as encoder:
        shelf = _Shelf(worker, encoder, run.sides)
        if (found := shelf.known()) is not None:
            return found
        crash_point("download.before")
        with phases.phase("download"):
            files = {side: _fetch(worker, phases, run, folder, side) for side in _SIDES}
        shelf.named_by(files)
        if shelf.taken() is None:
            with phases.phase("encode"):
                shelf.put(files, _Progress(phases, files))
            crash_point("encode.after")
    shutil.rmtree(folder / "data", ignore_errors=True)
    made = shelf.taken()
    if made is None:
        raise DataError(f"{shelf.path}: what was just written there is damaged; look at the disk")
    return made


class _Shelf:
    """Where encoded datasets stay, and the place of one of them."""

    def __init__(self, worker: Worker, encoder: Encoder, sides: Sides) -> None:
        self._worker = worker
        self._data = worker.recipe.data
        self._encoder = encoder
        self._root = worker.workdir / "cache" / "encoded"
        self._facts = {"format": FORMAT, "rules": encoder.fingerprint(), "data": _what_decides(self._data)}
        named = {
            side: [[[o.uri, o.etag, o.version, o.size] for o in objects] for objects in sources]
            for side, sources in (("train", sides.train), ("validation", sides.validation))
        }
        self._objects_name = f"objects-{_short_hash(self._facts | named)}.json"
        self._objects: dict[str, list[dict[str, Any]]] = {}
        self.path = self._root

    def known(self) -> Encoded | None:
        """The dataset of these very objects; None: they have to be fetched."""
        for path in self._root.glob(f"*/{self._objects_name}"):
            with contextlib.suppress(OSError, ValueError):
                self._objects = json.loads(path.read_bytes())
                self.path = path.parent
                return self.taken()
        return None

    def named_by(self, files: _Files) -> None:
        """The files are there, and with them the name of what comes of them."""
        content = {side: [[[file.name, file.sha256] for file in own] for own in files[side]] for side in _SIDES}
        self._objects = {side: [_object(file) for file in chain(*files[side])] for side in _SIDES}
        self.path = self._root / _short_hash(self._facts | content)

    def taken(self) -> Encoded | None:
        """The dataset at this place, verified; None: there is none."""
        kept = LocalFolder(self.path)
        try:
            manifest = kept.manifest(lambda facts: self._facts.items() <= facts.items())
            damaged = kept.damaged(manifest.files, self._worker.should_stop)
            found = None if damaged else self._opened(manifest.facts)
        except NotFoundError:
            return None
        except (DataError, OSError, KeyError, TypeError, ValueError) as error:
            damaged, found = [str(error)], None
        if found is None:
            log.warning("encoded_data_damaged", folder=str(self.path), damaged=damaged, message="it is encoded anew")
            kept.withdraw()
        else:
            self._remember(kept)
        return found

    def _opened(self, facts: Mapping[str, Any]) -> Encoded:
        return Encoded(
            sides={side: EncodedSet(self.path / _name(side)) for side in _SIDES},
            audit=Audit(
                objects={side: tuple(DataObject(**o) for o in self._objects[side]) for side in _SIDES},
                tallies=_TALLIES.validate_python(facts["seen"]),
            ),
        )

    def _remember(self, kept: LocalFolder) -> None:
        """What these objects are, and that it was used now."""
        with contextlib.suppress(OSError):
            os.utime(kept.manifest_path)
        with whole_file(self.path / self._objects_name, durable=False) as file:
            file.write(json.dumps(self._objects).encode())
        log.info("encoded_data", folder=str(self.path), message="it is used again by every start with the same data")

    def put(self, files: _Files, progress: "_Progress") -> None:
        """Encode the files.

        Raises:
            DataError: wrong lines.
        """
        self._make_room()
        tallies = new_tallies(self._data)
        facts = dict(self._facts)
        with LocalFolder(self.path).commit(facts) as entries:
            with ExitStack() as stack:
                out = {
                    s: stack.enter_context(whole_file(self.path / _name(s), trouble=_trouble, durable=False))
                    for s in _SIDES
                }
                for file in out.values():
                    file.write(stream_start())
                for chunk in self._encoded(files, progress):
                    tallies[chunk.side][chunk.source].merge(chunk.tally)
                    for side, rows in chunk.rows.items():
                        out[side].write(rows)
                    progress.encoded(chunk.examples)
                judge_sources((*self._data.sources, *self._data.held_out_sources), [*chain(*tallies.values())])
                for file in out.values():
                    file.write(STREAM_END)
            entries |= {_name(side): FileEntry(size=out[side].size, sha256=out[side].sha256) for side in _SIDES}
            facts["seen"] = _TALLIES.dump_python(tallies, mode="json")

    def _encoded(self, files: _Files, progress: "_Progress") -> Iterator[EncodedChunk]:
        longest = self._data.max_record
        chunks = chain.from_iterable(
            in_chunks(read_lines(own, max_record=longest, on_read=progress.read), side=side, source=source)
            for side in _SIDES
            for source, own in enumerate(files[side])
        )
        return in_order(
            self._encoder,
            chunks,
            workers=_workers(look_at_machine(self._worker.workdir)),
            size_of=lambda chunk: chunk.size,
            should_stop=self._worker.should_stop,
            doing="encoding the data",
        )

    def _make_room(self) -> None:
        """Take away what was used least, and what starts that were stopped or killed left."""
        others = [LocalFolder(path) for path in self._root.glob("*/") if path != self.path]
        kept = [folder for folder in others if folder.is_committed()]
        for folder in sorted(kept, key=_used_at, reverse=True)[_KEPT - 1 :]:
            folder.delete()
        for folder in others:
            if not folder.is_committed():
                remove_dead(folder.path)
                # One that another start has just made is empty as well.
                with contextlib.suppress(OSError):
                    if time.time() - folder.path.stat().st_mtime > _LEFT_SECONDS and not _is_written(folder.path):
                        folder.delete()
        remove_dead(self.path)


class _Progress:
    """How far the encoding is: how fast it goes, and when it will be done."""

    def __init__(self, phases: Phases, files: _Files) -> None:
        self._phases = phases
        self._of = sum(file.path.stat().st_size for side in _SIDES for file in chain(*files[side]))
        self._began = time.monotonic()
        self._read = self._examples = 0

    def read(self, count: int) -> None:
        """So many bytes more of the files were read."""
        self._read += count

    def encoded(self, examples: int) -> None:
        """So many examples more are written."""
        self._examples += examples
        seconds = max(time.monotonic() - self._began, 1e-9)
        self._phases.progress(
            examples=self._examples,
            share=round(self._read / max(self._of, 1), 3),
            examples_per_second=round(self._examples / seconds),
            megabytes_per_second=round(self._read / seconds / 1e6, 1),
            eta_seconds=round(seconds * (self._of - self._read) / max(self._read, 1)),
        )
        crash_point("encode.middle")


def _workers(machine: Machine) -> int:
    """Processes that encode: one a core, as many as there is memory for."""
    memory = machine.memory_limit_bytes or machine.memory_bytes
    return max(1, min(int(machine.cpus), int(memory * _OF_MEMORY) // _WORKER_BYTES))


def _fetch(worker: Worker, phases: Phases, run: Run, folder: Path, side: Side) -> list[list[DataFile]]:
    sources, beside = (run.sides.train, run.validation) if side == "train" else (run.sides.validation, run.train)
    arriving = partial(_downloading, phases, side)
    return fetch_sources(worker, sources, folder / "data" / side, beside=beside, on_progress=arriving)


def _downloading(phases: Phases, side: Side, done: int, of: int) -> None:
    phases.progress(side=side, bytes=done, of=of)
    crash_point("download.middle")


def _what_decides(data: DataSection) -> dict[str, Any]:
    """Each source's section without what is looked at later, and without where the files are."""
    later = {"train", "validation", "max_length", "too_long", "unused_limit"}
    sides = {"train": data.sources, "validation": data.held_out_sources}
    own = {side: [each.data.model_dump(mode="json", exclude=later) for each in sides[side]] for side in sides}
    return own | ({"fraction": data.validation.fraction} if isinstance(data.validation, Fraction) else {})


def _object(file: DataFile) -> dict[str, Any]:
    source = file.source
    return {
        "uri": source.uri,
        "etag": source.etag,
        "version": source.version,
        "size": source.size,
        "sha256": file.sha256,
    }


def _trouble(error: OSError, path: Path) -> JobError:
    return LocalDiskError(
        f"{path}: {error.strerror or error}; give the work folder more room, or name another one with --workdir"
    )


def _name(side: Side) -> str:
    return f"{side}.arrow"


def _is_written(folder: Path) -> bool:
    """Whether a start that lives writes there: what a dead one was writing is gone by then."""
    return any(folder.glob(f"{TEMPORARY}*"))


def _used_at(folder: LocalFolder) -> float:
    """When it was used last, in Unix seconds."""
    with contextlib.suppress(OSError):
        return folder.manifest_path.stat().st_mtime
    return 0.0


def _short_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
