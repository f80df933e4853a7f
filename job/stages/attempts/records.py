"""An attempt's two records in the store: that it began, how it ended; and what the earlier ones mean for it."""

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import structlog

from job import __version__
from job.core.attempt.ended import WITHOUT_A_WORD, ended_without_a_word
from job.core.attempt.history import FINAL_WHEN_REPEATED, repeated_failure, same_failure, stopped_in_vain
from job.core.errors import (
    DivergedError,
    JobError,
    LocalDiskError,
    LockedError,
    StalledError,
    StopRequestedError,
    exit_code,
)
from job.core.given import as_records
from job.core.visible import visible
from job.edge.host.logs import bind
from job.edge.run.lock import Lock
from job.stages.attempt import Attempt
from job.stages.attempts.identity import Run

log = structlog.get_logger(__name__)
_REMEMBERED = 2
"""Earlier attempts that are read: all that any decision looks at."""


class AttemptRecords:
    """This attempt's two records in the store, and its hold on the run."""

    def __init__(self, attempt: Attempt, found: Run, lock: Lock) -> None:
        self._attempt = attempt
        self._found = found
        self._lock = lock
        self._earlier: list[dict[str, Any]] = []
        self._ended = False
        self._refused = False
        self.number: int | None = None
        """Which attempt this is, from 1; None before `begin`."""
        if lock.taken_from is not None:
            attempt.notes.append(f"taken over from {attempt.hide(lock.taken_from)}, which had fallen silent")

    def refuse_repeated_failure(self) -> None:
        """Look at how the last attempts ended.

        Raises:
            JobError: in the same way at the same step, twice: a third time costs as much and ends as they did.
        """
        self._earlier = self._found.artifacts.attempts(newest=_REMEMBERED)
        self._close_open_ones()
        end = repeated_failure(self._earlier)
        if end is None or self._attempt.force:
            return
        self._attempt.standing.final = self._refused = True
        kind = {LocalDiskError.code: LocalDiskError, StalledError.code: StalledError}.get(end["exit_code"], JobError)
        raise kind(
            f"{self._found.artifacts.uri}: the last two attempts failed in the same way at step {end.get('step')}: "
            f"{end.get('reason')}; correct the cause, then start once with --force"
        )

    def _close_open_ones(self) -> None:
        """Leave word for earlier attempts that left none: the lock is ours, so they are dead, or shut out."""
        artifacts = self._found.artifacts
        for attempt in self._earlier:
            if attempt["end"] is not None:
                continue
            committed = artifacts.checkpoints()
            ended = ended_without_a_word(
                attempt, run_uri=artifacts.uri, found=now(), newest_step=committed[-1].step if committed else None
            )
            facts: dict[str, Any] = {"exit_code": None, "kind": None, "reason": WITHOUT_A_WORD, "found": ended.time}
            if self._lock.held_at_least is not None and self._lock.held_at_least[0] == attempt.get("fence"):
                facts["lasted_at_least"] = self._lock.held_at_least[1]
            try:
                if artifacts.end_attempt(attempt["number"], facts | {"version": __version__}):
                    artifacts.leave_ending(ended)
            except JobError as trouble:
                log.warning("attempt_end_not_written", number=attempt["number"], reason=str(trouble))

    def begin(self) -> int:
        """Freeze the run if it is new, and take an attempt number; the second call returns the same one."""
        if self.number is None:
            self._found.artifacts.begin_run(self._found.record, overrides=self._overrides())
            self._attempt.runs_at(self._found.artifacts.uri)
            self._take_number()
            log.info("attempt", number=self.number, run_uri=self._found.artifacts.uri)
        assert self.number is not None
        return self.number

    def explain(self, error: BaseException) -> BaseException:
        """What an error means once the lock and the earlier attempts are looked at."""
        if self._lock.lost and not isinstance(error, LockedError):
            return LockedError(
                f"{self._found.artifacts.uri}: another attempt took the run over while this one was silent; let it work"
            )
        standing = self._attempt.standing
        if isinstance(error, DivergedError):
            good = standing.last_committed_step
            where = (
                "there is no good checkpoint" if good is None else f"the last good checkpoint is that of step {good}"
            )
            return DivergedError(f"{error}; {where}")
        if isinstance(error, StopRequestedError) and not standing.gained and stopped_in_vain(self._earlier):
            return StalledError(
                f"{error}; the third stop in a row before a new step was committed: give the job more time before "
                "it is stopped, or a machine that stays"
            )
        return error

    def end(self, error: BaseException | None) -> None:
        """Leave word of how it ended and give the lock back, once; a dead store must not hide why it ended."""
        if self._ended:
            return
        self._ended = True
        code = 0 if error is None else exit_code(error)
        try:
            self._write_end(code, error)
        except JobError as trouble:
            log.warning("attempt_end_not_written", reason=str(trouble))
            self._lock.abandon()
            return
        if self.number is None and not self._found.begun:
            self._lock.remove()
        else:
            self._lock.release()

    def _write_end(self, code: int, error: BaseException | None) -> None:
        facts = self._facts(code, error)
        if self._earlier and same_failure(self._earlier[-1]["end"], facts):
            self._attempt.standing.final = True
        if self._lock.lost or code == LockedError.code:  # held by another one now: no way in which this run ends
            return
        if self.number is None:
            # Bad input and a node without a GPU leave no run in the store. A stop and a failure that may come again
            # are counted, so they leave word; being refused for what was counted before is neither.
            if self._refused or code not in {StopRequestedError.code, *FINAL_WHEN_REPEATED}:
                return
            self._take_number()
        assert self.number is not None
        self._found.artifacts.end_attempt(self.number, facts)

    def _take_number(self) -> None:
        artifacts = self._found.artifacts
        self.number = artifacts.begin_attempt(
            {
                "started": self._attempt.started,
                "host": platform.node(),
                "fence": self._lock.fence,
                "ranks": self._attempt.standing.ranks,
                "overrides": self._overrides(),
            }
        )
        self._attempt.standing.number = self.number
        bind(attempt=self.number)

    def _overrides(self) -> list[dict[str, str]]:
        hide = self._attempt.hide
        return [{name: hide(value) for name, value in row.items()} for row in as_records(self._attempt.overrides)]

    def _facts(self, code: int, error: BaseException | None) -> Mapping[str, Any]:
        standing = self._attempt.standing
        return {
            "ended": now(),
            "exit_code": code,
            "kind": None if error is None else type(error).__name__,
            "reason": "finished"
            if error is None
            else visible(self._attempt.hide(f"{type(error).__name__}: {error}"))[:2000],
            "device": standing.device,
            "phase": self._attempt.phases.current,
            "step": standing.step,
            "from_step": standing.from_step,
            "last_committed_step": standing.last_committed_step,
            **({"gained_elsewhere": True} if standing.gained_elsewhere else {}),
            "phase_seconds": self._attempt.phases.seconds,
            "version": __version__,
        }


def now() -> str:
    """The time as records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
