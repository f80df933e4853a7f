"""A run's files in the store: what stands where, and the one door through which stages read and write it.

runs/{run_id}/run.json                              what the run is; create-only
runs/{run_id}/attempts/01.json, 01-end.json         who worked on it, and how that ended; create-only
runs/{run_id}/checkpoints/step-000050-a01/...       the state after a step, committed by its manifest
runs/{run_id}/lock.json                             who works on it now
runs/{run_id}/latest.json                           a hint for people
runs/{run_id}/adapter/...                           the chosen adapter
runs/{run_id}/report.html, *.png                    for people, made of the report
runs/{run_id}/examples.jsonl                        what came of each held-out example, hash in the report
runs/{run_id}/report.json                           last of all: the run is done
runs/{run_id}/pushed.json                           where on the hub it stands, if that was asked for

Before each write that counts the attempt looks whether the lock is still its own, and the write itself is on condition
of what the attempt knows: one that was frozen in between fails on what its successor has written since.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import structlog

from job.core.attempt.ended import Ended
from job.core.attempt.history import wrong_value
from job.core.crash_points import crash_point
from job.core.errors import DataError, RunConflictError
from job.core.reports.report import Report, read_report
from job.edge.run import endings
from job.edge.run.adapter import PublishedAdapter
from job.edge.run.channels import Channel
from job.edge.run.checkpoints import CHECKPOINTS, Checkpoint, Checkpoints
from job.edge.run.lock import Lock
from job.edge.run.run_store import RunStore, never
from job.edge.store.folder import FileEntry
from job.edge.store.json_objects import json_bytes, json_object
from job.edge.store.objects import ATTEMPT_BYTES, ObjectStore, PreconditionError

log = structlog.get_logger(__name__)
_REPORT = re.compile(r"runs/([^/]+)/report\.json")
_ATTEMPT = re.compile(r"attempts/(\d+)\.json")


class Artifacts:
    """One run's place in the store."""

    def __init__(self, store: ObjectStore, run_id: str, *, lock: Lock | None = None) -> None:
        """Without a lock it is for reading only."""
        self._store = store
        self.run_id = run_id
        self._run = RunStore(store, run_id, lock=lock)
        self._checkpoints = Checkpoints(self._run)
        self._adapter = PublishedAdapter(self._run)
        self._attempt = 0
        """Our number, once it is taken."""

    @property
    def uri(self) -> str:
        """Where a person finds the run."""
        return self._run.uri

    @property
    def conditional(self) -> bool:
        """Whether what we write is written on conditions."""
        return self._run.conditional

    def channel(self, name: str, *, conditional: bool) -> Channel:
        """A channel of the same output."""
        return Channel(self._store, name, conditional=conditional)

    def other_run(self, run_id: str) -> "Artifacts":
        """Another run of the same output, for reading."""
        return Artifacts(self._store, run_id)

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
            self._run.root + "lock.json",
            lease_seconds=lease_seconds,
            owner=owner,
            conditional=conditional,
            on_lost=on_lost,
        )

    def take_over(self) -> None:
        """Shut out whoever held the lock before, and clear what nobody will finish; the lock must be ours."""
        self._checkpoints.take_over()
        cleared = self._store.clear_unfinished(self._run.root)
        swept = self._checkpoints.sweep()
        if cleared or swept:
            log.info("leftovers_cleared", unfinished_uploads=cleared, uncommitted=swept)

    @property
    def fence(self) -> int:
        """Which owner of the run's lock we are; 0 without one."""
        return self._run.fence

    # --- what the run is ---------------------------------------------------------------------------------------------

    def run_record(self) -> dict[str, Any] | None:
        """What run.json says the run is, or None for a run that was not begun."""
        record = self._run.read_json("run.json")
        return None if record is None else {name: part for name, part in record.items() if name != "overrides"}

    def begin_run(self, record: Mapping[str, Any], *, overrides: Sequence[Mapping[str, str]] = ()) -> None:
        """Freeze what the run is.

        Args:
            record: what the run is.
            overrides: of the recipe, and where each came from; for people, and no part of what the run is.

        Raises:
            RunConflictError: another process began it in this moment, and as something else.
        """
        data = json_bytes({**record, "overrides": overrides})
        crash_point("run.before_record")
        self._run.confirm()
        try:
            self._store.write(self._run.root + "run.json", data, create_only=True)
        except PreconditionError as error:
            if self.run_record() != json_object(json_bytes(record)):
                raise RunConflictError(
                    f"{self.uri}: was begun with another recipe or other data; leave --run-id out, or choose another"
                ) from error

    def report(self) -> dict[str, Any] | None:
        """report.json, or None while the run is not done."""
        return self._run.read_json("report.json")

    def read_report(self) -> Report | None:
        """The same as a report.

        Raises:
            DataError: what stands there is none of this job.
        """
        content = self.report()
        try:
            return None if content is None else read_report(content)
        except ValueError as error:
            raise DataError(
                f"{self.uri}/report.json: damaged, or not of this job ({error}); take it away, and the run can be "
                "finished again"
            ) from error

    def publish_report(self, report: bytes) -> None:
        """Write the report: the run is done.

        A report that stands there already came from an attempt that had lost its lock without knowing: with a lower
        fence it is replaced, for `adapter/` is ours as well. Otherwise the first one holds.
        """
        key = self._run.root + "report.json"
        crash_point("report.before")
        self._run.confirm()
        try:
            self._store.write(key, report, create_only=True)
        except PreconditionError:
            self._run.confirm()
            data, etag = self._store.read(key)
            if _fence(data) < self.fence:
                self._store.write(key, report, if_match=etag if self._run.conditional else None)
        crash_point("report.after")

    def publish(self, name: str, content: bytes) -> None:
        """Write a small file that can be made again from the report (a picture, a page)."""
        self._run.confirm()
        self._store.write(self._run.root + name, content)

    def read_beside(self, name: str, *, max_bytes: int) -> bytes:
        """A small file that stands beside the report.

        Raises:
            NotFoundError: there is none.
            DataError: it is larger than `max_bytes`.
        """
        return self._store.read(self._run.root + name, max_bytes=max_bytes)[0]

    def finished_before(self, *, most: int) -> Iterator["Artifacts"]:
        """The other runs of this output that have a report, the newest first, at most so many; for reading only."""
        others = (run_id for run_id in finished_runs(self._store) if run_id != self.run_id)
        for run_id in islice(others, most):
            yield Artifacts(self._store, run_id)

    def publish_tracked(self, files: Mapping[str, Path]) -> None:
        """Put what trackers wrote on this machine beside the checkpoints, by name."""
        self._run.confirm()
        for name, path in files.items():
            self._store.upload(path, self._run.root + name, should_stop=never)

    def is_pushed(self, *, repository: str, finished: str) -> bool:
        """Whether the report of that time stands in a repository on the hub, as far as the store knows."""
        try:
            noted = self._run.read_json("pushed.json", max_bytes=ATTEMPT_BYTES) or {}
        except DataError:
            return False  # then it is pushed again, which changes nothing
        return (noted.get("repository"), noted.get("finished")) == (repository, finished)

    def note_pushed(self, facts: Mapping[str, str]) -> None:
        """Note where on the hub it stands; of several repositories the last one."""
        self._store.write(f"{self._run.root}pushed.json", json_bytes(facts))

    # --- attempts ----------------------------------------------------------------------------------------------------

    def begin_attempt(self, facts: Mapping[str, Any]) -> int:
        """Take the next attempt number; two processes never get the same one."""
        crash_point("run.after_record")
        self._run.confirm()
        number = 1 + max(self.attempt_numbers(), default=0)
        while True:
            data = json_bytes({**facts, "number": number})
            try:
                self._store.write(f"{self._run.root}attempts/{number:02d}.json", data, create_only=True)
            except PreconditionError:
                number += 1
            else:
                self._attempt = number
                crash_point("attempt.after_record")
                return number

    def end_attempt(self, number: int, facts: Mapping[str, Any]) -> bool:
        """Record how an attempt ended; False: that was known, and the first record holds."""
        try:
            self._store.write(f"{self._run.root}attempts/{number:02d}-end.json", json_bytes(facts), create_only=True)
        except PreconditionError:
            return False
        return True

    def leave_ending(self, ended: Ended) -> None:
        """Leave word, beside the runs, of an attempt that could not do it itself."""
        endings.leave(self._store, ended)

    def attempts(self, *, newest: int | None = None) -> list[dict[str, Any]]:
        """What is known of each attempt, or of the newest ones, in order.

        `end` is None for one that left no record of its end. A record that is damaged is passed over like one that is
        missing: what the run is does not depend on it.
        """
        numbers = self.attempt_numbers()
        return [
            (self._attempt_record(f"{number:02d}.json") or {})
            | {"number": number, "end": self._attempt_record(f"{number:02d}-end.json")}
            for number in (numbers if newest is None else numbers[-newest:])
        ]

    def _attempt_record(self, name: str) -> dict[str, Any] | None:
        try:
            record = self._run.read_json(f"attempts/{name}", max_bytes=ATTEMPT_BYTES)
        except DataError as error:
            reason: str | None = str(error)
        else:
            reason = None if record is None else wrong_value(record)
            if reason is None:
                return record
        log.warning("attempt_record_passed_over", record=f"{self.uri}/attempts/{name}", reason=reason)
        return None

    def attempt_numbers(self) -> list[int]:
        """The numbers taken so far, in order; ours also while a listing does not show it yet."""
        names = {entry.key.removeprefix(self._run.root) for entry in self._store.list(f"{self._run.root}attempts/")}
        listed = {int(match[1]) for name in names if (match := _ATTEMPT.fullmatch(name))}
        return sorted(listed | ({self._attempt} if self._attempt else set()))

    # --- checkpoints and the adapter ---------------------------------------------------------------------------------

    def publish_checkpoint(self, folder: Path, checkpoint: Checkpoint) -> None:
        """As `Checkpoints.publish`."""
        self._checkpoints.publish(folder, checkpoint)

    def checkpoints(self) -> list[Checkpoint]:
        """The committed checkpoints, oldest first."""
        return self._checkpoints.committed()

    def fetch_checkpoint(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        *,
        should_stop: Callable[[], bool],
        only: Collection[str] | None = None,
    ) -> dict[str, FileEntry]:
        """As `Checkpoints.fetch`."""
        return self._checkpoints.fetch(checkpoint, folder, should_stop=should_stop, only=only)

    def fetch_newest(
        self,
        folder: Path,
        *,
        should_stop: Callable[[], bool],
        only: Collection[str] | None = None,
        refusal: Callable[[Checkpoint, Path], str | None] = lambda _checkpoint, _folder: None,
    ) -> tuple[Checkpoint | None, list[dict[str, str]]]:
        """As `Checkpoints.fetch_newest`."""
        return self._checkpoints.fetch_newest(folder, should_stop=should_stop, only=only, refusal=refusal)

    def retain(self, steps: Collection[int], *, newest: int) -> None:
        """As `Checkpoints.retain`, for our own attempt."""
        self._checkpoints.retain(steps, newest=newest, attempt=self._attempt)

    def publish_adapter(self, folder: Path) -> dict[str, FileEntry]:
        """As `PublishedAdapter.publish`."""
        return self._adapter.publish(folder)

    def add_to_adapter(self, path: Path) -> FileEntry:
        """As `PublishedAdapter.add`."""
        return self._adapter.add(path)

    def fetch_adapter(self, folder: Path, files: Mapping[str, FileEntry], *, should_stop: Callable[[], bool]) -> None:
        """As `PublishedAdapter.fetch`."""
        self._adapter.fetch(folder, files, should_stop=should_stop)

    def holds_adapter(self, files: Mapping[str, FileEntry]) -> bool:
        """As `PublishedAdapter.holds`."""
        return self._adapter.holds(files)


def _fence(report: bytes) -> int:
    """Of a report that stands there already; 0: it is none."""
    try:
        fence = json_object(report).get("fence")
    except ValueError:
        return 0
    return fence if type(fence) is int else 0


def finished_runs(store: ObjectStore) -> list[str]:
    """The ids of the runs that have a report, newest first."""
    found = store.list("runs/", without=CHECKPOINTS)
    reports = [(entry.modified, match[1]) for entry in found if (match := _REPORT.fullmatch(entry.key))]
    return [run_id for _, run_id in sorted(reports, reverse=True)]


def begun_runs(store: ObjectStore) -> list[str]:
    """The ids of all runs, those that were begun last first; what no run.json names comes last."""
    began: dict[str, float] = {}
    for entry in store.list("runs/"):
        if entry.key.count("/") > 1:
            run_id, name = entry.key.split("/", 2)[1:]
            began[run_id] = entry.modified if name == "run.json" else began.get(run_id, 0.0)
    return sorted(began, key=lambda run_id: (-began[run_id], run_id))


def runs_of(store: ObjectStore, prefix: str) -> Iterator[Artifacts]:
    """The runs whose id begins with the prefix, in the order of their ids."""
    for run_id in sorted(store.folders(f"runs/{prefix}")):
        yield Artifacts(store, run_id)


def unfinished_runs(store: ObjectStore, prefix: str) -> Iterator[Artifacts]:
    """As `runs_of`, those that were begun and have no report: one listing, whatever stands beside them."""
    begun, done = set(), set()
    for entry in store.list(f"runs/{prefix}", without=CHECKPOINTS):
        _, run_id, *name = entry.key.split("/")
        if name == ["run.json"]:
            begun.add(run_id)
        elif name == ["report.json"]:
            done.add(run_id)
    for run_id in sorted(begun - done):
        yield Artifacts(store, run_id)
