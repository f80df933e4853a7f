"""Where a run's files stand in the store, and the commit protocol: files first, manifest last.

runs/{run_id}/run.json                              what the run is; create-only
runs/{run_id}/attempts/01.json, 01-end.json         who worked on it, and how that ended; create-only
runs/{run_id}/checkpoints/step-000050-a01/...       the state after a step, by attempt: keys are never reused
runs/{run_id}/checkpoints/step-000050-a01/MANIFEST.json   sizes and sha256; create-only, last: THE COMMIT
runs/{run_id}/latest.json                           a hint for people; resuming lists the manifests
runs/{run_id}/adapter/...                           the chosen adapter
runs/{run_id}/report.json                           create-only, last of all: the run is done
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from job.core.errors import DataError, NotFoundError, RunConflictError
from job.edge.storage import ObjectStore, PreconditionError

log = structlog.get_logger(__name__)

_MANIFEST = "MANIFEST.json"
_ATTEMPT = re.compile(r"attempts/(\d+)\.json")
_CHECKPOINT = re.compile(r"checkpoints/step-(\d+)-a(\d+)/(.+)")


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Checkpoint:
    """A committed checkpoint; ordered by step, then by attempt."""

    step: int
    attempt: int

    @property
    def name(self) -> str:
        """Its folder below checkpoints/."""
        return f"step-{self.step:06d}-a{self.attempt:02d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a manifest."""

    size: int
    """Bytes."""
    sha256: str


class Artifacts:
    """One run's place in the store."""

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        self._store = store
        self.run_id = run_id
        self._root = f"runs/{run_id}/"

    @property
    def uri(self) -> str:
        """Where a person finds the run."""
        return f"{self._store.uri.rstrip('/')}/{self._root.rstrip('/')}"

    # --- what the run is ---------------------------------------------------------------------------------------------

    def run_record(self) -> dict[str, Any] | None:
        """run.json, or None for a run that was not begun."""
        return self._read_json("run.json")

    def begin_run(self, record: Mapping[str, Any]) -> None:
        """Freeze what the run is.

        Raises:
            RunConflictError: another process began it in this moment, and as something else.
        """
        try:
            self._store.write(self._root + "run.json", _json(record), create_only=True)
        except PreconditionError as error:
            if self.run_record() != json.loads(_json(record)):
                msg = f"{self.uri}: was begun with another recipe or other data; leave --run-id out, or choose another"
                raise RunConflictError(msg) from error

    def report(self) -> dict[str, Any] | None:
        """report.json, or None while the run is not done."""
        return self._read_json("report.json")

    def publish_report(self, report: bytes) -> None:
        """Say that the run is done; if it was said already, the first word holds."""
        with contextlib.suppress(PreconditionError):
            self._store.write(self._root + "report.json", report, create_only=True)

    def publish(self, name: str, content: bytes) -> None:
        """Write a small file that can be made again from the report (a picture, a page)."""
        self._store.write(self._root + name, content)

    def publish_events(self, paths: Sequence[Path], *, attempt: int) -> None:
        """Put TensorBoard's event files of one attempt beside the others: `tensorboard --logdir` reads them all."""
        for path in paths:
            self._store.upload(path, f"{self._root}tensorboard/a{attempt:02d}/{path.name}", should_stop=_never)

    # --- attempts ----------------------------------------------------------------------------------------------------

    def begin_attempt(self, facts: Mapping[str, Any]) -> int:
        """Take the next attempt number; two processes never get the same one."""
        number = 1 + len(self.attempts())
        while True:
            try:
                self._store.write(
                    f"{self._root}attempts/{number:02d}.json", _json({**facts, "number": number}), create_only=True
                )
            except PreconditionError:
                number += 1
            else:
                return number

    def end_attempt(self, number: int, facts: Mapping[str, Any]) -> None:
        """Say how an attempt ended."""
        with contextlib.suppress(PreconditionError):
            self._store.write(f"{self._root}attempts/{number:02d}-end.json", _json(facts), create_only=True)

    def attempts(self) -> list[dict[str, Any]]:
        """What is known of each attempt, in order; `end` is None for one that ended without a word."""
        names = {entry.key.removeprefix(self._root) for entry in self._store.list(f"{self._root}attempts/")}
        numbers = sorted(int(match[1]) for name in names if (match := _ATTEMPT.fullmatch(name)))
        return [
            (self._read_json(f"attempts/{number:02d}.json") or {"number": number})
            | {"end": self._read_json(f"attempts/{number:02d}-end.json")}
            for number in numbers
        ]

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def publish_checkpoint(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Upload a folder, then commit it by its manifest.

        Raises:
            PreconditionError: this very checkpoint is committed already.
        """
        place = f"{self._root}checkpoints/{checkpoint.name}/"
        files = {}
        for path in sorted(folder.iterdir()):
            sent = self._store.upload(path, place + path.name, should_stop=_never)
            files[path.name] = {"size": sent.size, "sha256": sent.sha256}
        manifest = {"step": checkpoint.step, "attempt": checkpoint.attempt, "files": files}
        self._store.write(place + _MANIFEST, _json(manifest), create_only=True)
        self._store.write(self._root + "latest.json", _json({"checkpoint": checkpoint.name, "step": checkpoint.step}))

    def checkpoints(self) -> list[Checkpoint]:
        """The committed checkpoints, oldest first."""
        return self._begun_and_committed()[1]

    def _begun_and_committed(self) -> tuple[list[Checkpoint], list[Checkpoint]]:
        """Those with a file in the store, and those of them with a manifest; each oldest first."""
        begun, committed = set(), set()
        for entry in self._store.list(f"{self._root}checkpoints/"):
            match = _CHECKPOINT.fullmatch(entry.key.removeprefix(self._root))
            if match:
                checkpoint = Checkpoint(step=int(match[1]), attempt=int(match[2]))
                begun.add(checkpoint)
                if match[3] == _MANIFEST:
                    committed.add(checkpoint)
        return sorted(begun), sorted(committed)

    def fetch_checkpoint(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        *,
        should_stop: Callable[[], bool],
        only: Collection[str] | None = None,
    ) -> dict[str, FileEntry]:
        """Bring a checkpoint's files into the folder, each verified against the manifest.

        Raises:
            DataError: a file is not what the manifest says.
            NotFoundError: a file or the manifest is gone.
        """
        place = f"{self._root}checkpoints/{checkpoint.name}/"
        wanted = {n: e for n, e in self._manifest(place).items() if only is None or n in only}
        folder.mkdir(parents=True, exist_ok=True)
        for name, entry in wanted.items():
            self._store.download(place + name, folder / name, sha256=entry.sha256, should_stop=should_stop)
        return wanted

    def fetch_newest(
        self, folder: Path, *, should_stop: Callable[[], bool]
    ) -> tuple[Checkpoint | None, list[dict[str, str]]]:
        """Bring the newest checkpoint that verifies into the folder.

        Returns:
            Which one it is (None: there is none), and those passed over, each with the reason.
        """
        passed_over: list[dict[str, str]] = []
        begun, committed = self._begun_and_committed()
        for checkpoint in reversed(begun):
            reason = f"no {_MANIFEST}: its upload was not finished, or it is being deleted"
            if checkpoint in committed:
                try:
                    self.fetch_checkpoint(checkpoint, folder / checkpoint.name, should_stop=should_stop)
                except (DataError, NotFoundError) as error:
                    shutil.rmtree(folder / checkpoint.name, ignore_errors=True)
                    reason = str(error)
                else:
                    return checkpoint, passed_over
            log.warning("checkpoint_passed_over", checkpoint=checkpoint.name, reason=reason)
            passed_over.append({"checkpoint": checkpoint.name, "reason": reason})
        return None, passed_over

    def retain(self, steps: Collection[int], *, newest: int) -> None:
        """Delete the checkpoints that are neither among the newest nor of one of these steps.

        The manifest goes first: a checkpoint is either whole or does not exist. What attempts before the last one that
        committed left without a manifest goes too: they were killed while they uploaded or deleted it.
        """
        begun, committed = self._begun_and_committed()
        latest_of_step = {checkpoint.step: checkpoint for checkpoint in committed}
        kept = {*[*latest_of_step.values()][-newest:], *(c for step, c in latest_of_step.items() if step in steps)}
        last_attempt = max((checkpoint.attempt for checkpoint in committed), default=0)
        for checkpoint in begun:
            unwanted = checkpoint not in kept if checkpoint in committed else checkpoint.attempt < last_attempt
            if unwanted:
                place = f"{self._root}checkpoints/{checkpoint.name}/"
                self._store.delete([place + _MANIFEST])
                self._store.delete([entry.key for entry in self._store.list(place)])

    def _manifest(self, place: str) -> dict[str, FileEntry]:
        try:
            files = json.loads(self._store.read(place + _MANIFEST)[0])["files"]
            return {_plain_name(n): FileEntry(size=f["size"], sha256=f["sha256"]) for n, f in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            msg = f"{self.uri}: {place}{_MANIFEST} is damaged ({error})"
            raise DataError(msg) from error

    # --- the adapter -------------------------------------------------------------------------------------------------

    def publish_adapter(self, folder: Path) -> dict[str, FileEntry]:
        """Put the chosen adapter where it is read from.

        An earlier attempt may have been killed here; what it left is the same adapter, or was never named by a report.
        """
        files = {}
        for path in sorted(folder.iterdir()):
            sent = self._store.upload(path, f"{self._root}adapter/{path.name}", should_stop=_never)
            files[path.name] = FileEntry(size=sent.size, sha256=sent.sha256)
        return files

    def fetch_adapter(self, folder: Path, files: Mapping[str, FileEntry], *, should_stop: Callable[[], bool]) -> None:
        """Bring the published adapter back, verified."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, entry in files.items():
            key = f"{self._root}adapter/{_plain_name(name)}"
            self._store.download(key, folder / name, sha256=entry.sha256, should_stop=should_stop)

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            content = json.loads(self._store.read(self._root + name)[0])
        except NotFoundError:
            return None
        except ValueError as error:
            msg = f"{self.uri}/{name}: not JSON ({error}); it was not written by this job, or is damaged"
            raise DataError(msg) from error
        if not isinstance(content, dict):
            msg = f"{self.uri}/{name}: not a JSON object; it was not written by this job"
            raise DataError(msg)
        return content


def runs_of(store: ObjectStore, prefix: str) -> Iterator[Artifacts]:
    """The runs whose id begins with the prefix, in the order of their ids."""
    start = f"runs/{prefix}"
    ids = {entry.key.split("/")[1] for entry in store.list(start) if entry.key.count("/") > 1}
    for run_id in sorted(ids):
        yield Artifacts(store, run_id)


def _plain_name(name: str) -> str:
    # A manifest comes from a bucket: its names must not reach out of the folder they are written to.
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        msg = f"{name!r} is no plain file name"
        raise ValueError(msg)
    return name


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
