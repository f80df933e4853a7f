"""The committed checkpoints of a run: publish, list, fetch, and delete those that are no longer needed.

checkpoints/step-000050-a01/...   the state after a step, by attempt: keys are never reused
latest.json                       a hint: resuming lists the manifests, and asks for those that it names

Who holds the lock lists them once, when it takes over, and from then on knows what it commits and deletes: a listing
that lags behind hides nothing from it, and thousands of checkpoints are not listed anew with each one.
"""

import contextlib
import math
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from job.core.crash_points import crash_point
from job.core.errors import DataError, DeniedError, LocalDiskError, NotFoundError
from job.edge.run.run_store import ROUNDS, RunStore, never
from job.edge.store.folder import MANIFEST, Facts, FileEntry, StoredFolder, refuse_if_full, total_bytes
from job.edge.store.json_objects import json_bytes, json_object
from job.edge.store.objects import SMALL_BYTES, PreconditionError

log = structlog.get_logger(__name__)

CHECKPOINTS = "checkpoints"
"""Their folder in a run."""
_LEFTOVER_SECONDS = 24 * 3600.0
"""What was uploaded but never committed is kept this long: a person may want to look, and clocks differ."""
_PAGE = 100
"""So many checkpoints fit into a page of a listing (a thousand objects); a store with more is listed less often."""
_NAME = re.compile(r"step-(\d{1,12})-a(\d{1,12})")
_KEY = re.compile(rf"{CHECKPOINTS}/{_NAME.pattern}/(.+)")


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
class _Stored:
    """What stands in the store."""

    begun: dict[Checkpoint, float] = field(default_factory=dict)
    """Those with a file, and when the newest was written (Unix seconds, by the store's clock); ours are never old."""
    committed: set[Checkpoint] = field(default_factory=set)
    """Those of them with a manifest."""


class Checkpoints:
    """The checkpoints of one run in the store."""

    def __init__(self, run: RunStore) -> None:
        """Nothing is asked of the store yet."""
        self._run = run
        self.latest = Latest(run)
        self._known: _Stored | None = None
        """What stands there, kept up to date by whoever holds the lock; None: it is not ours."""
        self._inherited: frozenset[Checkpoint] = frozenset()
        """Committed when we took the lock. Another one of an earlier attempt is an orphan: it came after."""
        self._commits = 0
        """Since the last listing."""

    def take_over(self) -> None:
        """Note what earlier attempts committed, and shut them out of latest.json; the lock must be ours."""
        known = self._listed()
        for hinted in _named(self.latest.take_over()):
            if hinted not in known.committed and self._folder(hinted).is_committed():
                log.info("checkpoint_not_listed", checkpoint=hinted.name, message="the store's listing lags behind")
                known.begun[hinted] = math.inf
                known.committed.add(hinted)
        self._inherited, self._known = frozenset(known.committed), known

    def sweep(self) -> list[str]:
        """Delete checkpoints that were never committed and are old; their names."""
        stored = self._stored()
        # By the clock that dated the files: our lock has just been written too. This machine's may be hours off.
        now = max((entry.modified for entry in self._run.store.list(f"{self._run.root}lock.json")), default=0.0)
        swept = []
        for checkpoint, written in sorted(stored.begun.items()):
            if checkpoint not in stored.committed and now - written > _LEFTOVER_SECONDS:
                self._run.confirm()
                self._folder(checkpoint).delete()
                self._forget(checkpoint)
                swept.append(checkpoint.name)
        return swept

    def publish(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Upload a folder, then commit it by its manifest.

        Raises:
            PreconditionError: this very checkpoint is committed already.
        """
        stored = self._folder(checkpoint)
        if self._known is not None:
            self._known.begun[checkpoint] = math.inf
        with stored.commit(_facts(checkpoint, fence=self._run.fence), create_only=True) as files:
            for path in sorted(folder.iterdir()):
                crash_point("checkpoint.before_file")
                files[path.name] = stored.upload(path, path.name, should_stop=never)
                crash_point("checkpoint.after_file")
            crash_point("checkpoint.before_manifest")
            self._run.confirm()
        self._commits += 1
        if self._known is not None:
            self._known.committed.add(checkpoint)
        crash_point("checkpoint.after_manifest")
        crash_point("checkpoint.before_latest")
        stand = sorted({checkpoint} if self._known is None else self._known.committed)[-_PAGE:]
        committed = [each.name for each in stand]
        self.latest.write({"checkpoint": checkpoint.name, "step": checkpoint.step, "committed": committed})
        crash_point("checkpoint.after_latest")

    def committed(self) -> list[Checkpoint]:
        """The committed checkpoints, oldest first."""
        return sorted(self._stored().committed)

    def fetch(
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
            LocalDiskError: there is no room for it here.
            NotFoundError: a file or the manifest is gone.
        """
        stored = self._folder(checkpoint)
        named = stored.manifest(lambda facts: facts == _facts(checkpoint, fence=facts.get("fence"))).files
        if only is not None and (missing := sorted({*only} - named.keys())):
            raise DataError(f"{stored.uri}/{MANIFEST} does not name {', '.join(missing)}")
        wanted = {name: entry for name, entry in named.items() if only is None or name in only}
        stored.refuse_other_sizes(wanted)
        try:
            refuse_if_full(folder, needed_bytes=total_bytes(wanted))
        except LocalDiskError as error:
            # A manifest comes from a bucket and may name any size: unless the store holds as much, the checkpoint is at
            # fault and not the disk.
            if stored.holds(wanted):
                raise
            raise DataError(f"{stored.uri}: does not fit here ({error})") from error
        stored.download(wanted, folder, should_stop=should_stop, on_file=lambda: crash_point("resume.middle"))
        return wanted

    def fetch_newest(
        self,
        folder: Path,
        *,
        should_stop: Callable[[], bool],
        only: Collection[str] | None = None,
        refusal: Callable[[Checkpoint, Path], str | None] = lambda _checkpoint, _folder: None,
    ) -> tuple[Checkpoint | None, list[dict[str, str]]]:
        """Bring the newest checkpoint that verifies into the folder.

        Args:
            folder: gets a folder by the checkpoint's name.
            should_stop: polled while files arrive.
            only: the files that make a checkpoint; one whose manifest names fewer is passed over.
            refusal: takes one that verifies, in its folder; says why it is no good, or None where it is.

        Returns:
            Which one it is (None: there is none), and those passed over, each with the reason.

        Raises:
            LocalDiskError: there is no room for it here: then none is passed over, or the run would begin anew.
        """
        passed_over: list[dict[str, str]] = []
        stored = self._stored()
        # The last attempt first: what an earlier one committed after it had lost its lock is no part of the run.
        for checkpoint in sorted(stored.begun, key=_by_attempt, reverse=True):
            reason = f"no {MANIFEST}: its upload was not finished, or it is being deleted"
            if checkpoint in stored.committed:
                try:
                    self.fetch(checkpoint, folder / checkpoint.name, should_stop=should_stop, only=only)
                except (DataError, NotFoundError) as error:
                    reason = str(error)
                    if isinstance(error, NotFoundError):  # deleted while it was read: it does not count as one to keep
                        stored.committed.discard(checkpoint)
                else:
                    found = refusal(checkpoint, folder / checkpoint.name)
                    if found is None:
                        return checkpoint, passed_over
                    reason = found
                shutil.rmtree(folder / checkpoint.name, ignore_errors=True)
            log.warning("checkpoint_passed_over", checkpoint=checkpoint.name, reason=reason)
            passed_over.append({"checkpoint": checkpoint.name, "reason": reason})
        return None, passed_over

    def retain(self, steps: Collection[int], *, newest: int, attempt: int) -> None:
        """Delete the checkpoints that are neither among the newest nor of one of these steps.

        The manifest goes first: a checkpoint is either whole or does not exist. An orphan, which an earlier attempt
        committed after it had lost the lock, goes too, and so does what earlier attempts left without a manifest: they
        were killed while they uploaded or deleted it, and without the lock they cannot commit it.

        Args:
            steps: their checkpoints stay.
            newest: how many of the last steps stay.
            attempt: our number; 0: we are no attempt.
        """
        stored = self._stored()
        begun, committed = {*stored.begun}, {*stored.committed}
        if self._known is not None and self._commits > len(committed) // _PAGE:
            late = self._listed()  # what an attempt that lost its lock has sent since
            begun, committed, self._commits = begun | {*late.begun}, committed | late.committed, 0
        last_attempt = attempt or max((checkpoint.attempt for checkpoint in committed), default=0)
        ours = [checkpoint for checkpoint in sorted(committed) if not self._is_orphan(checkpoint, attempt)]
        kept = _kept(ours, steps, newest=newest)
        for checkpoint in sorted(begun):
            if checkpoint not in kept if checkpoint in committed else checkpoint.attempt < last_attempt:
                self._run.confirm()
                crash_point("retain.before_delete")
                self._folder(checkpoint).delete(on_withdrawn=lambda: crash_point("retain.after_manifest"))
                self._forget(checkpoint)

    def _folder(self, checkpoint: Checkpoint) -> StoredFolder:
        return self._run.folder(f"{CHECKPOINTS}/{checkpoint.name}")

    def _stored(self) -> _Stored:
        return self._listed() if self._known is None else self._known

    def _listed(self) -> _Stored:
        """What the store lists now."""
        stored = _Stored()
        for entry in self._run.store.list(f"{self._run.root}{CHECKPOINTS}/"):
            match = _KEY.fullmatch(entry.key.removeprefix(self._run.root))
            if match:
                checkpoint = Checkpoint(step=int(match[1]), attempt=int(match[2]))
                stored.begun[checkpoint] = max(entry.modified, stored.begun.get(checkpoint, 0.0))
                if match[3] == MANIFEST:
                    stored.committed.add(checkpoint)
        return stored

    def _forget(self, checkpoint: Checkpoint) -> None:
        if self._known is not None:
            self._known.begun.pop(checkpoint, None)
            self._known.committed.discard(checkpoint)

    def _is_orphan(self, checkpoint: Checkpoint, attempt: int) -> bool:
        return self._known is not None and checkpoint not in self._inherited and checkpoint.attempt != attempt


class Latest:
    """latest.json, the one object of a run that is swapped again and again."""

    def __init__(self, run: RunStore) -> None:
        """Nothing is asked of the store yet."""
        self._run = run
        self._key = run.root + "latest.json"
        self._etag: str | None = None
        """As we know it; None: there is none."""
        self._denied = False
        """It was said already that we may not write it."""

    def take_over(self) -> Mapping[str, Any]:
        """Write it anew: an earlier owner's write, on condition of the old one, fails from now on.

        Returns:
            What it says; nothing where there is none.
        """
        content: Mapping[str, Any] = {}
        with contextlib.suppress(NotFoundError):
            try:
                data, self._etag = self._run.store.read(self._key, max_bytes=SMALL_BYTES)
            except DataError:  # a hint is never so large, and nothing depends on it
                data, self._etag = b"", self._run.etag(self._key)
            content = _hint(data)
            self.write(content)
        return content

    def write(self, content: Mapping[str, Any]) -> None:
        """Swap it; what an attempt that died wrote in between is replaced, what a living one wrote is not."""
        data = json_bytes({**content, "fence": self._run.fence})
        for _ in range(ROUNDS):
            self._run.confirm()
            try:
                self._etag = self._write_once(data)
            except (PreconditionError, NotFoundError):
                self._etag = self._run.etag(self._key)
            except DeniedError as error:
                if not self._denied:
                    log.warning("latest_not_written", reason=str(error), message="nothing depends on it")
                self._denied = True
                return
            else:
                return
        log.warning("latest_not_written", reason="it changes all the time; nothing depends on it")

    def _write_once(self, data: bytes) -> str:
        if not self._run.conditional:
            return self._run.store.write(self._key, data)
        if self._etag is None:
            return self._run.store.write(self._key, data, create_only=True)
        return self._run.store.write(self._key, data, if_match=self._etag)


def _hint(data: bytes) -> Facts:
    """What latest.json may say, from what stands there."""
    try:
        content = json_object(data)
    except ValueError:
        return {}
    kinds = {"checkpoint": str, "step": int, "committed": list}
    return {name: content[name] for name, kind in kinds.items() if type(content.get(name)) is kind}


def _named(hint: Facts) -> list[Checkpoint]:
    """The checkpoints that latest.json names, the newest first: each is asked for, so only a page of them."""
    names = [hint.get("checkpoint"), *reversed(hint.get("committed", []))]
    found = [_NAME.fullmatch(name) for name in names if isinstance(name, str)]
    named = dict.fromkeys(Checkpoint(step=int(each[1]), attempt=int(each[2])) for each in found if each is not None)
    return list(named)[:_PAGE]


def _facts(checkpoint: Checkpoint, *, fence: Any) -> Facts:
    return {"step": checkpoint.step, "attempt": checkpoint.attempt, "fence": fence}


def _kept(ours: Sequence[Checkpoint], steps: Collection[int], *, newest: int) -> set[Checkpoint]:
    """Those that stay: one a step, the last attempt's, where the step is among these or among the newest."""
    last_of_step = {checkpoint.step: checkpoint for checkpoint in ours}
    newest_ones = sorted(last_of_step.values(), key=_by_attempt)[-newest:]
    return {*newest_ones, *(checkpoint for step, checkpoint in last_of_step.items() if step in steps)}


def _by_attempt(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint.attempt, checkpoint.step
