"""Where a run's files stand in the store, and the commit protocol: files first, manifest last.

runs/{run_id}/run.json                              what the run is; create-only
runs/{run_id}/attempts/01.json, 01-end.json         who worked on it, and how that ended; create-only
runs/{run_id}/checkpoints/step-000050-a01/...       the state after a step, by attempt: keys are never reused
runs/{run_id}/checkpoints/step-000050-a01/MANIFEST.json   sizes and sha256; create-only, last: THE COMMIT
runs/{run_id}/lock.json                             who works on it now
runs/{run_id}/latest.json                           a hint for people; resuming lists the manifests
runs/{run_id}/adapter/...                           the chosen adapter
runs/{run_id}/report.json                           last of all: the run is done

Before each write that counts the attempt looks whether the lock is still its own, and the write itself is on condition
of what the attempt knows: one that was frozen in between fails on what its successor has written since.
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from job.core.crash_points import crash_point
from job.core.errors import DataError, NotFoundError, RunConflictError
from job.edge.run.lock import Lock
from job.edge.store.objects import ObjectStore, PreconditionError, Uploaded

log = structlog.get_logger(__name__)
_MANIFEST = "MANIFEST.json"
_ATTEMPT = re.compile(r"attempts/(\d+)\.json")
_LEFTOVER_SECONDS = 24 * 3600.0
"""What was uploaded but never committed is kept so long: a person may want to look, and clocks differ."""
_ROUNDS = 5
"""How often a conditional write is tried anew against leftovers of attempts that died."""
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

    def __init__(self, store: ObjectStore, run_id: str, *, lock: Lock | None = None) -> None:
        """Without a lock it is for reading only."""
        self._store = store
        self.run_id = run_id
        self._root = f"runs/{run_id}/"
        self._lock = lock
        self._latest: str | None = None
        """ETag of latest.json as we know it; None: there is none."""
        self._inherited: frozenset[Checkpoint] | None = None
        """Committed when we took the lock. Another one of an earlier attempt is an orphan: it came after."""
        self._attempt = 0
        """Our number, once it is taken."""

    @property
    def uri(self) -> str:
        """Where a person finds the run."""
        return f"{self._store.uri.rstrip('/')}/{self._root.rstrip('/')}"

    # --- the lock -----------------------------------------------------------------------------------------------------

    def under(self, lock: Lock) -> "Artifacts":
        """The same run, to be written to under a lock that is not taken yet."""
        return Artifacts(self._store, self.run_id, lock=lock)

    def make_lock(
        self, *, lease_seconds: float, owner: Mapping[str, Any], conditional: bool, on_lost: Callable[[], None]
    ) -> Lock:
        """The run's lock, not taken yet."""
        return Lock(
            self._store,
            self._root + "lock.json",
            lease_seconds=lease_seconds,
            owner=owner,
            conditional=conditional,
            on_lost=on_lost,
        )

    def take_over(self) -> None:
        """Shut out whoever held the lock before, and clear what nobody will finish; the lock must be ours.

        latest.json is written anew: an earlier owner's write, on condition of the old one, fails from now on.
        """
        self._inherited = frozenset(self.checkpoints())
        with contextlib.suppress(NotFoundError):
            data, self._latest = self._store.read(self._root + "latest.json")
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(data)
                self._write_latest(content if isinstance(content, dict) else {})
        cleared = self._store.clear_unfinished(self._root)
        swept = self._sweep()
        if cleared or swept:
            log.info("leftovers_cleared", unfinished_uploads=cleared, uncommitted=swept)

    def _confirm(self) -> None:
        if self._lock is not None:
            self._lock.confirm()

    @property
    def fence(self) -> int:
        """Which owner of the run's lock we are; 0 without one."""
        return self._lock.fence if self._lock is not None else 0

    @property
    def _conditional(self) -> bool:
        return self._lock is not None and self._lock.conditional

    def _sweep(self) -> list[str]:
        """Delete checkpoints that were never committed and are old."""
        begun, committed = self._begun_and_committed()
        swept = []
        for checkpoint in begun:
            if checkpoint not in committed:
                entries = [*self._store.list(f"{self._root}checkpoints/{checkpoint.name}/")]
                if all(time.time() - entry.modified > _LEFTOVER_SECONDS for entry in entries):
                    self._confirm()
                    self._store.delete([entry.key for entry in entries])
                    swept.append(checkpoint.name)
        return swept

    def _write_latest(self, content: Mapping[str, Any]) -> None:
        """Swap latest.json; what an attempt that died wrote in between is replaced, what a living one wrote is not."""
        key, data = self._root + "latest.json", _json({**content, "fence": self.fence})
        for _ in range(_ROUNDS):
            self._confirm()
            try:
                if not self._conditional:
                    self._latest = self._store.write(key, data)
                elif self._latest is None:
                    self._latest = self._store.write(key, data, create_only=True)
                else:
                    self._latest = self._store.write(key, data, if_match=self._latest)
            except (PreconditionError, NotFoundError):
                self._latest = self._etag(key)
            else:
                return
        log.warning("latest_not_written", reason="it changes all the time; nothing depends on it")

    def _etag(self, key: str) -> str | None:
        try:
            return self._store.stat(key).etag
        except NotFoundError:
            return None

    # --- what the run is ---------------------------------------------------------------------------------------------

    def run_record(self) -> dict[str, Any] | None:
        """run.json, or None for a run that was not begun."""
        return self._read_json("run.json")

    def begin_run(self, record: Mapping[str, Any]) -> None:
        """Freeze what the run is.

        Raises:
            RunConflictError: another process began it in this moment, and as something else.
        """
        crash_point("run.before_record")
        self._confirm()
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
        """Say that the run is done.

        A report that stands there already came from an attempt that had lost its lock without knowing: with a lower
        fence it is replaced, for `adapter/` is ours as well. Otherwise the first word holds.
        """
        key = self._root + "report.json"
        crash_point("report.before")
        self._confirm()
        try:
            self._store.write(key, report, create_only=True)
        except PreconditionError:
            self._confirm()
            data, etag = self._store.read(key)
            if json.loads(data).get("fence", 0) < self.fence:
                self._store.write(key, report, if_match=etag if self._conditional else None)
        crash_point("report.after")

    def publish(self, name: str, content: bytes) -> None:
        """Write a small file that can be made again from the report (a picture, a page)."""
        self._confirm()
        self._store.write(self._root + name, content)

    def publish_events(self, paths: Sequence[Path], *, attempt: int) -> None:
        """Put TensorBoard's event files of one attempt beside the others: `tensorboard --logdir` reads them all."""
        self._confirm()
        for path in paths:
            self._store.upload(path, f"{self._root}tensorboard/a{attempt:02d}/{path.name}", should_stop=_never)

    # --- attempts ----------------------------------------------------------------------------------------------------

    def begin_attempt(self, facts: Mapping[str, Any]) -> int:
        """Take the next attempt number; two processes never get the same one."""
        crash_point("run.after_record")
        self._confirm()
        number = 1 + max(self.attempt_numbers(), default=0)
        while True:
            try:
                self._store.write(
                    f"{self._root}attempts/{number:02d}.json", _json({**facts, "number": number}), create_only=True
                )
            except PreconditionError:
                number += 1
            else:
                self._attempt = number
                crash_point("attempt.after_record")
                return number

    def end_attempt(self, number: int, facts: Mapping[str, Any]) -> None:
        """Say how an attempt ended."""
        with contextlib.suppress(PreconditionError):
            self._store.write(f"{self._root}attempts/{number:02d}-end.json", _json(facts), create_only=True)

    def attempts(self, *, newest: int | None = None) -> list[dict[str, Any]]:
        """What is known of each attempt, or of the newest ones, in order.

        `end` is None for one that ended without a word.
        """
        numbers = self.attempt_numbers()
        return [
            (self._read_json(f"attempts/{number:02d}.json") or {})
            | {"number": number, "end": self._read_json(f"attempts/{number:02d}-end.json")}
            for number in (numbers if newest is None else numbers[-newest:])
        ]

    def attempt_numbers(self) -> list[int]:
        """The numbers taken so far, in order."""
        names = {entry.key.removeprefix(self._root) for entry in self._store.list(f"{self._root}attempts/")}
        return sorted(int(match[1]) for name in names if (match := _ATTEMPT.fullmatch(name)))

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def publish_checkpoint(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Upload a folder, then commit it by its manifest.

        Raises:
            PreconditionError: this very checkpoint is committed already.
        """
        place = f"{self._root}checkpoints/{checkpoint.name}/"
        files = {}
        for path in sorted(folder.iterdir()):
            crash_point("checkpoint.before_file")
            sent = self._store.upload(path, place + path.name, should_stop=_never)
            files[path.name] = FileEntry(size=sent.size, sha256=sent.sha256)
            crash_point("checkpoint.after_file")
        manifest = _manifest_of(checkpoint, fence=self.fence, files=files)
        crash_point("checkpoint.before_manifest")
        self._confirm()
        try:
            self._store.write(place + _MANIFEST, _json(manifest), create_only=True)
        except PreconditionError:
            # An earlier try of ours got so far; another one's would differ.
            if self._read_json(f"checkpoints/{checkpoint.name}/{_MANIFEST}") != manifest:
                raise
        crash_point("checkpoint.after_manifest")
        crash_point("checkpoint.before_latest")
        self._write_latest({"checkpoint": checkpoint.name, "step": checkpoint.step})
        crash_point("checkpoint.after_latest")

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
        """Bring a checkpoint's files, or `only` some, into the folder, each verified against the manifest.

        Raises:
            DataError: a file is not what the manifest says, or the manifest does not name it.
            NotFoundError: a file or the manifest is gone.
        """
        place = f"{self._root}checkpoints/{checkpoint.name}/"
        named = self._manifest(checkpoint)
        if only is not None and (missing := sorted({*only} - named.keys())):
            raise DataError(f"{self.uri}: {place}{_MANIFEST} does not name {', '.join(missing)}")
        wanted = {name: entry for name, entry in named.items() if only is None or name in only}
        folder.mkdir(parents=True, exist_ok=True)
        self._refuse_sizes(place, wanted, folder)
        for name, entry in wanted.items():
            self._store.download(place + name, folder / name, sha256=entry.sha256, should_stop=should_stop)
            crash_point("resume.middle")
        return wanted

    def fetch_newest(
        self, folder: Path, *, should_stop: Callable[[], bool], only: Collection[str] | None = None
    ) -> tuple[Checkpoint | None, list[dict[str, str]]]:
        """Bring the newest checkpoint that verifies into the folder.

        Args:
            folder: gets a folder by the checkpoint's name.
            should_stop: polled while files arrive.
            only: the files that make a checkpoint; one whose manifest names fewer is passed over.

        Returns:
            Which one it is (None: there is none), and those passed over, each with the reason.
        """
        passed_over: list[dict[str, str]] = []
        begun, committed = self._begun_and_committed()
        # The last attempt first: what an earlier one committed after it had lost its lock is no part of the run.
        for checkpoint in sorted(begun, key=_by_attempt, reverse=True):
            reason = f"no {_MANIFEST}: its upload was not finished, or it is being deleted"
            if checkpoint in committed:
                try:
                    place = folder / checkpoint.name
                    self.fetch_checkpoint(checkpoint, place, should_stop=should_stop, only=only)
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

        The manifest goes first: a checkpoint is either whole or does not exist. An orphan, which an earlier attempt
        committed after it had lost the lock, goes too, and so does what earlier attempts left without a manifest: they
        were killed while they uploaded or deleted it, and without the lock they cannot commit it.
        """
        begun, committed = self._begun_and_committed()
        last_attempt = self._attempt or max((checkpoint.attempt for checkpoint in committed), default=0)
        latest_of_step = {checkpoint.step: checkpoint for checkpoint in committed if not self._is_orphan(checkpoint)}
        newest_ones = sorted(latest_of_step.values(), key=_by_attempt)[-newest:]
        kept = {*newest_ones, *(c for step, c in latest_of_step.items() if step in steps)}
        for checkpoint in begun:
            if checkpoint not in kept if checkpoint in committed else checkpoint.attempt < last_attempt:
                self._confirm()
                place = f"{self._root}checkpoints/{checkpoint.name}/"
                crash_point("retain.before_delete")
                self._store.delete([place + _MANIFEST])
                crash_point("retain.after_manifest")
                self._store.delete([entry.key for entry in self._store.list(place)])

    def _refuse_sizes(self, place: str, wanted: Mapping[str, FileEntry], folder: Path) -> None:
        """What comes from a bucket must not fill the disk: neither by what the manifest says nor in spite of it."""
        room = shutil.disk_usage(folder).free
        if sum(entry.size for entry in wanted.values()) > room:
            sizes = sum(entry.size for entry in wanted.values())
            raise DataError(f"{self.uri}: {place} is said to hold {sizes} bytes, and only {room} are free in {folder}")
        stored = {entry.key.removeprefix(place): entry.size for entry in self._store.list(place)}
        for name, entry in wanted.items():
            if stored.get(name, entry.size) != entry.size:
                raise DataError(f"{self.uri}: {place}{name} has {stored[name]} bytes, {entry.size} in the manifest")

    def _is_orphan(self, checkpoint: Checkpoint) -> bool:
        known = self._inherited
        return known is not None and checkpoint not in known and checkpoint.attempt != self._attempt

    def _manifest(self, checkpoint: Checkpoint) -> dict[str, FileEntry]:
        key = f"{self._root}checkpoints/{checkpoint.name}/{_MANIFEST}"
        try:
            content = json.loads(self._store.read(key)[0])
            files = {_plain_name(name): file_entry(facts) for name, facts in content["files"].items()}
            expected = _manifest_of(checkpoint, fence=content["fence"], files=files)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            msg = f"{self.uri}: {key} is damaged ({error})"
            raise DataError(msg) from error
        if content != expected:
            raise DataError(f"{self.uri}: {key} is damaged (it is not what is written for {checkpoint.name})")
        return files

    # --- the adapter -------------------------------------------------------------------------------------------------

    def publish_adapter(self, folder: Path) -> dict[str, FileEntry]:
        """Put the chosen adapter where it is read from.

        Each file is created, never overwritten unseen: what an attempt left that was killed here, and that no report
        names, is replaced on condition that it is still the same.
        """
        files = {}
        for path in sorted(folder.iterdir()):
            crash_point("adapter.before_file")
            sent = self._publish_file(path, f"{self._root}adapter/{path.name}")
            files[path.name] = FileEntry(size=sent.size, sha256=sent.sha256)
            crash_point("adapter.after_file")
        for entry in [*self._store.list(f"{self._root}adapter/")]:
            if entry.key.rpartition("/")[2] not in files:  # another version of the job wrote one more
                self._confirm()
                self._store.delete([entry.key])
        return files

    def _publish_file(self, path: Path, key: str) -> Uploaded:
        for _ in range(_ROUNDS if self._conditional else 0):
            etag = self._etag(key)
            self._confirm()  # after it: whatever changes from here on fails the condition
            try:
                return self._store.upload(path, key, create_only=etag is None, if_match=etag, should_stop=_never)
            except (PreconditionError, NotFoundError):
                log.info("adapter_file_met", key=key, message="it appeared in this moment; looking again")
        self._confirm()
        return self._store.upload(path, key, should_stop=_never)

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
        except (ValueError, RecursionError) as error:
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


def _manifest_of(checkpoint: Checkpoint, *, fence: int, files: Mapping[str, FileEntry]) -> dict[str, Any]:
    return {
        "step": checkpoint.step,
        "attempt": checkpoint.attempt,
        "fence": fence,
        "files": {name: asdict(entry) for name, entry in files.items()},
    }


def _by_attempt(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint.attempt, checkpoint.step


def _plain_name(name: str) -> str:
    # A manifest comes from a bucket: its names must not reach out of the folder they are written to.
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        msg = f"{name!r} is no plain file name"
        raise ValueError(msg)
    return name


def file_entry(facts: Mapping[str, Any]) -> FileEntry:
    """One file's entry, as it is read from a manifest.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    size, sha256 = facts["size"], facts["sha256"]
    if type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{64}", sha256):
        msg = f"{facts!r:.200} is no size and sha256"
        raise ValueError(msg)
    return FileEntry(size=size, sha256=sha256)


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
