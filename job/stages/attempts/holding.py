"""Holds a run as its only attempt: takes the lock, and leaves word of how it ended."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import structlog

from job.core.crash_points import crash_point
from job.core.errors import Again, ending, exit_code
from job.stages.attempt import Attempt
from job.stages.attempts.guard import Guard
from job.stages.attempts.identity import Run, probe_output
from job.stages.attempts.records import AttemptRecords

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A run that is ours alone."""

    run: Run
    """Looked up again, now that nobody else changes it."""
    records: AttemptRecords


@contextmanager
def hold(attempt: Attempt, found: Run, guard: Guard) -> Iterator[Held]:
    """Work on the run as its only attempt, until the block ends.

    Raises:
        LockedError: another attempt lives.
        JobError: what the block raised, as the lock and the earlier attempts explain it.
    """
    lock = found.artifacts.make_lock(
        lease_seconds=attempt.lease_seconds,
        owner={"host": platform.node(), "pid": os.getpid()},
        conditional=_probe(attempt),
        on_lost=lambda: attempt.ask_to_stop("another attempt has taken the run over"),
    )
    with attempt.phases.phase("lock"):
        lock.acquire(above=max(found.artifacts.attempt_numbers(), default=0), should_stop=attempt.moves_on)
    crash_point("lock.acquired")
    artifacts = found.artifacts.under(lock)
    # What was seen before the lock was ours may have changed since.
    run = replace(found, artifacts=artifacts, begun=artifacts.run_record() is not None)
    records = AttemptRecords(attempt, run, lock)
    outer = guard.explain, guard.end_records

    def end_both(error: BaseException) -> None:
        """Of a run that needs this one, where there is one, as well."""
        records.end(error)
        outer[1](error)

    guard.explain, guard.end_records = records.explain, end_both
    try:
        run = replace(run, done=artifacts.report() is not None)
        if not run.done:
            artifacts.take_over()
        yield Held(run=run, records=records)
    except BaseException as error:
        ended = records.explain(error)
        records.end(ended)
        if records.number is None and ending(exit_code(ended)).again is Again.NEVER:
            # Nobody comes back for it: a folder for each refused night would fill the disk.
            shutil.rmtree(attempt.worker.run_folder(artifacts.run_id), ignore_errors=True)
        if ended is error:
            raise
        raise ended from error
    finally:
        guard.explain, guard.end_records = outer
    records.end(None)


def _probe(attempt: Attempt) -> bool:
    """Whether the store keeps conditions on writes."""
    with attempt.phases.phase("try_output"):
        found = probe_output(attempt.worker.recipe.output, attempt.worker.settings)
    if not found.conditional:
        log.warning("no_conditional_writes", reason=found.reason)
        attempt.notes.append(
            "the store does not keep conditions on writes, so the lock was a lease that is read back: attempts that "
            f"begin in the same two seconds may both work ({attempt.hide(found.reason)})"
        )
    return found.conditional
