"""How a process ends: every failure gets its code of the table, in the log and in the outcome file."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from job.core.errors import JobError, LocalDiskError, StopRequestedError, action_for, ending, exit_code
from job.edge.host.interrupt import Interrupt

if TYPE_CHECKING:
    from job.edge.host.outcome import Outcome
    from job.stages.attempt import Attempt, Standing


@dataclass(slots=True, kw_only=True)
class Session:
    """What the front door knows of this process, from its first option to its end."""

    interrupt: Interrupt
    as_json: bool = True
    """Whether events are JSON lines."""
    hide: Callable[[str], str] = str
    """Takes secrets out of a text that is kept."""
    outcome: "Outcome | None" = None
    """The outcome file, once its option was read."""
    attempt: "Attempt | None" = None
    """Once the recipe was read."""
    failure: JobError | None = None
    """What a command that showed all it found ends with."""

    def end(self, error: BaseException | None, *, shown: bool) -> int:
        """Log how it ended, and write it into the outcome file; returns the exit code.

        Args:
            error: None: it did not fail.
            shown: whether the error was shown already.
        """
        code = 0 if error is None else exit_code(error)
        if error is not None and code == LocalDiskError.code and not isinstance(error, JobError):
            error = LocalDiskError(f"{error}; give the work folder more room, or name another one with --workdir")
        standing = self.attempt.standing if self.attempt else None
        again = "no" if standing and standing.final else ending(code).again.value
        if error is not None and not shown:
            self._log(error, code, again, standing)
        if self.outcome:
            self.outcome.end(
                code=code,
                again=again,
                reason="done" if error is None else self.hide(_reason(error)),
                last_committed_step=standing.last_committed_step if standing else None,
                run_uri=standing.run_uri if standing else None,
                action=action_for(error),
            )
        return code

    def _log(self, error: BaseException, code: int, again: str, standing: "Standing | None") -> None:
        stopped = code == StopRequestedError.code
        facts: dict[str, Any] = {
            "exit_code": code,
            "reason": _reason(error),
            "again": again,
            "action": action_for(error),
            "signal": self.interrupt.reason if stopped else None,
            "last_committed_step": standing.last_committed_step if standing else None,
            "run_uri": standing.run_uri if standing else None,
        }
        if code == JobError.code:
            facts["traceback"] = "".join(traceback.format_exception(error))
        log = structlog.get_logger(__name__)
        (log.warning if stopped else log.error)("ended", **{k: v for k, v in facts.items() if v is not None})


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
