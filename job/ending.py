"""How a process ends: every failure gets its code of the table, and word of it is left wherever somebody may look."""

import contextvars
import errno
import platform
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from job import __version__
from job.core.attempt.limits import ENDING_SECONDS
from job.core.attempt.seat import Seat
from job.core.errors import JobError, LocalDiskError, StopRequestedError, action_for, ending, exit_code, is_effect
from job.edge.host.interrupt import Interrupt

if TYPE_CHECKING:
    from job.core.attempt.ended import Ended, EndedPromotion
    from job.core.reports.report import Report
    from job.edge.host.metrics import MetricsFile
    from job.edge.host.notice import Notice
    from job.edge.host.outcome import Outcome
    from job.stages.attempt import Attempt, Standing

log = structlog.get_logger(__name__)
_FILE_FIRST_SECONDS = 5.0
"""How long the log waits for the outcome file: a healthy disk takes milliseconds."""
_OTHERS_SECONDS = 30.0
"""How long telling the other processes of a run may take: who ends early has yet to load what speaks to them."""
_SUPERVISOR_BYTES = 2**20
_WORD_SECONDS = 10.0
"""How long the store and whoever is to be notified may take: each is tried three times meanwhile."""


@dataclass(slots=True, kw_only=True)
class Session:
    """What the front door knows of this process, from its first option to its end."""

    interrupt: Interrupt
    as_json: bool = True
    """Whether events are JSON lines."""
    hide: Callable[[str], str] = str
    """Takes secrets out of a text that is kept."""
    hub_token: str | None = field(default=None, repr=False)
    """What HF_TOKEN is."""
    outcome: "Outcome | None" = None
    """The outcome file, once its option was read."""
    metrics: "MetricsFile | None" = None
    notice: "Notice | None" = None
    output: str | None = None
    """Where the ending is written down; None: this command, or a recipe that names no output, leaves none."""
    recipe: str | None = None
    """The file's name."""
    attempt: "Attempt | None" = None
    """Once the recipe was read."""
    failure: JobError | None = None
    """What a command that showed all it found ends with."""
    seat: Seat | None = None
    """Among the processes of a run, whose supervisor then speaks for all of them; None: there is no other."""

    def open_outcome(self, path: Path | None) -> None:
        """From here on the outcome file is kept current."""
        from job.edge.host.outcome import Outcome

        if self.seat is None:
            self.outcome = Outcome(path)
        else:  # our supervisor's alone, who takes all of it
            self.outcome = Outcome(Path(self.seat.folder) / self.seat.outcome, limit_bytes=_SUPERVISOR_BYTES)
        if self.metrics is not None:
            self.outcome.follow(self.metrics.write)

    def open_metrics(self, path: Path) -> None:
        """From here on the metrics file says what the outcome file says."""
        from job.edge.host.metrics import MetricsFile

        if self.seat is not None:
            return
        self.metrics = MetricsFile(path)
        if self.outcome is not None:
            self.outcome.follow(self.metrics.write)

    def open_rest(self, environment: Mapping[str, str], *, is_run: bool) -> None:
        """What the environment names and no option has opened: a mistake on the command line may have come before."""
        from job.edge.host.notice import Notice

        if self.outcome is None and (file := environment.get("JOB_OUTCOME_FILE")):
            self.open_outcome(Path(file))
        if is_run and self.metrics is None and (file := environment.get("JOB_METRICS_FILE")):
            self.open_metrics(Path(file))
        if is_run and self.notice is None and (url := environment.get("JOB_NOTIFY_URL")):
            with suppress(JobError):  # one mistake at a time
                self.notice = Notice(url)

    def word_is_left_elsewhere(self) -> None:
        """Another node speaks for the run: who is to be notified hears of it once, and the store as well."""
        self.output = self.notice = None

    def end(self, error: BaseException | None, *, shown: bool) -> int:
        """Write how it ended into the outcome file, and log it; returns the exit code.

        Neither waits for the other for long: the file's disk may hang, and nobody may read the log.

        Args:
            error: None: it did not fail.
            shown: whether the error was shown already.
        """
        error = _understood(error)
        code = _code(error)
        standing = self.attempt.standing if self.attempt else None
        written = _aside(partial(self._write_outcome, error, standing))
        written(_FILE_FIRST_SECONDS)
        if self.seat is not None:
            shown = shown or code != JobError.code or is_effect(error)  # the supervisor says it, without a traceback
            near = self.interrupt.signalled
            _aside(partial(self._tell_others, self.seat, error))(_FILE_FIRST_SECONDS if near else _OTHERS_SECONDS)
        if error is not None and not shown:
            with suppress(Exception):  # the code is decided, and the outcome file has it
                self._log(error, standing)
        written(None)
        return code

    def leave_word(self, error: BaseException | None) -> None:
        """Write the ending into the store, and notify whoever asked for it: both outlive this machine.

        Neither can fail the job, and together they take no longer than what is left until a kill.
        """
        seconds = self._word_seconds() if self.seat is None else 0.0
        if (self.output is None and self.notice is None) or seconds <= 0:
            return
        until = time.monotonic() + seconds
        try:
            ended = self._ended(_understood(error))
            works: list[Callable[[], None]] = []
            if self.output is not None and (error is not None or ended.attempt is not None):
                # A run that was done already is left as it is, and so is what stands beside it.
                works.append(partial(self._leave_ending, self.output, ended, seconds))
            if self.notice is not None:
                works.append(partial(self.notice.send, _notice(ended), seconds=seconds))
            for done in [_aside(work) for work in works]:
                if not done(max(0.0, until - time.monotonic())):
                    log.warning(
                        "word_not_left", reason=f"no answer in {seconds:.0f} s; the log and the outcome have it"
                    )
        except Exception as trouble:  # noqa: BLE001 - the job has ended, and its exit code stands
            log.warning("word_not_left", reason=self.hide(str(trouble)))

    def _tell_others(self, seat: Seat, error: BaseException | None) -> None:
        from job.tune.ranks import leave_cause

        with suppress(JobError):  # they are gone, or their launcher is
            leave_cause(seat, error)

    def _word_seconds(self) -> float:
        """How long that may take; the interpreter's own end comes after it, and before the kill."""
        attempt, now, kills = self.attempt, time.monotonic(), [float("inf")]
        if attempt is not None:
            if attempt.is_kill_near():
                kills.append((attempt.standing.asked_at or now) + attempt.limits.grace_seconds)
            if attempt.limits.deadline is not None:
                kills.append(attempt.limits.deadline)
        return min(_WORD_SECONDS, min(kills) - now - ENDING_SECONDS)

    def _leave_ending(self, output: str, ended: "Ended", seconds: float) -> None:
        from job.edge.run import endings
        from job.edge.store.objects import StoreSettings
        from job.edge.store.opening import open_store
        from job.edge.store.patience import Patience

        settings = self.attempt.worker.settings if self.attempt else StoreSettings()
        patience = Patience(attempts=3, budget_seconds=seconds, first_pause_seconds=0.5, longest_pause_seconds=1.0)
        try:
            endings.leave(open_store(output, settings, patience=patience), ended)
        except JobError as trouble:
            if trouble.code != ended.code:  # else the job has ended with just that
                log.warning("ending_not_written", reason=self.hide(str(trouble)))

    def _ended(self, error: BaseException | None) -> "Ended":
        from job.core.attempt.ended import LONGEST_REASON, Ended
        from job.stages.attempt import Standing

        standing = self.attempt.standing if self.attempt else Standing()
        return Ended(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            code=_code(error),
            again=_again(error, standing),
            reason=self._kept(_reason(error, standing))[:LONGEST_REASON],
            action=self._kept(action_for(error))[:LONGEST_REASON],
            host=platform.node(),
            recipe=None if self.recipe is None else self._kept(self.recipe),
            run_uri=None if standing.run_uri is None else self._kept(standing.run_uri),
            attempt=standing.number,
            phase=self.attempt.phases.current if self.attempt else None,
            step=standing.step if self.attempt else None,
            last_committed_step=standing.last_committed_step,
            signal=self.interrupt.reason if isinstance(error, StopRequestedError) else None,
            job_version=__version__,
            promotion=self._promotion(standing),
            late=[self._kept(each) for each in standing.late] or None,
        )

    def _promotion(self, standing: "Standing") -> "EndedPromotion | None":
        found = standing.promotion
        if found is None:
            return None
        kept = {"why": self._kept(found.why), "report": self._kept(found.report)}
        return found.model_copy(update={**kept, "also": [self._kept(each) for each in found.also]})

    def _kept(self, text: str) -> str:
        """Without secrets, and without what UTF-8 cannot hold: names of files may be any bytes."""
        return self.hide(text).encode("utf-8", "replace").decode()

    def _write_outcome(self, error: BaseException | None, standing: "Standing | None") -> None:
        if self.outcome is None and self.metrics is not None:
            self.open_outcome(None)
        if self.outcome:
            self.outcome.end(
                code=_code(error),
                again=_again(error, standing),
                reason=self.hide(_reason(error, standing)),
                last_committed_step=standing.last_committed_step if standing else None,
                run_uri=standing.run_uri if standing else None,
                action=action_for(error),
                beside=self._beside(error, standing),
            )

    def _beside(self, error: BaseException | None, standing: "Standing | None") -> dict[str, Any] | None:
        if self.seat is None:
            return None
        promotion = self._promotion(standing) if standing else None
        return {
            "effect": is_effect(error) or None,
            "attempt": standing.number if standing else None,
            "late": [self._kept(each) for each in standing.late] if standing and standing.late else None,
            "promotion": None if promotion is None else promotion.model_dump(mode="json"),
        }

    def _log(self, error: BaseException, standing: "Standing | None") -> None:
        code = _code(error)
        stopped = code == StopRequestedError.code
        facts: dict[str, Any] = {
            "exit_code": code,
            "reason": _reason(error, standing),
            "again": _again(error, standing),
            "action": action_for(error),
            "signal": self.interrupt.reason if stopped else None,
            "last_committed_step": standing.last_committed_step if standing else None,
            "run_uri": standing.run_uri if standing else None,
        }
        if code == JobError.code and not is_effect(error):
            facts["traceback"] = "".join(traceback.format_exception(error))
        (log.warning if stopped else log.error)("ended", **{k: v for k, v in facts.items() if v is not None})


def log_finished(report: "Report") -> None:
    """How it ended well, in one event."""
    log.info(
        "finished",
        base_loss=round(report.sweet_spot.base_loss, 4),
        tuned_loss=round(report.sweet_spot.loss, 4),
        chosen_step=report.sweet_spot.step,
        report=f"{report.run_uri}/report.json",
        **({} if report.promotion is None else {"outcome": report.promotion.outcome, "why": report.promotion.said}),
    )


def _understood(error: BaseException | None) -> BaseException | None:
    """The failure as one of ours, where it is the machine's: a full disk, memory that ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        # Its frames hold what did not fit, and what follows needs some memory too.
        traceback.clear_frames(error.__traceback__)
        failure = JobError(
            f"the memory of the machine, or of the container, ran out ({_named(error)})",
            action="give the job more memory; `plan` says how much it asks for",
        )
        failure.__cause__ = error
        return failure
    if error is not None and _code(error) == LocalDiskError.code and not isinstance(error, JobError):
        return LocalDiskError(f"{error}; give the work folder more room, or name another one with --workdir")
    return error


def _code(error: BaseException | None) -> int:
    return 0 if error is None else exit_code(error)


def _again(error: BaseException | None, standing: "Standing | None") -> str:
    return "no" if standing and standing.final else ending(_code(error)).again.value


def _reason(error: BaseException | None, standing: "Standing | None") -> str:
    if error is not None:
        return _named(error)
    late = standing.late if standing else ()
    return f"done; left out, not whole yet: {'; '.join(late)}" if late else "done"


def _named(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _notice(ended: "Ended") -> dict[str, Any]:
    """The ending, and one line of text, which is what chats show."""
    from job.core.attempt.ended import one_line

    said = ended.reason if ended.promotion is None else f"{ended.promotion.channel}: {ended.promotion.why}"
    if ended.promotion is not None and ended.late:
        said += f"; left out, not whole yet: {'; '.join(ended.late)}"
    what = f"qlora-job ended {ended.code} on {ended.host}: {said}"
    run = "" if ended.run_uri is None else f" ({ended.run_uri})"
    return {**ended.model_dump(mode="json", exclude_none=True), "text": one_line(what, at_most=500) + run}


def _aside(work: Callable[[], None]) -> Callable[[float | None], bool]:
    """Work on a thread of its own, whose events stay ours.

    Returns:
        Waits for its end, for so many seconds at most; whether it has come.
    """
    done = threading.Event()

    def carry_out() -> None:
        try:
            work()
        finally:
            done.set()

    try:
        threading.Thread(target=contextvars.copy_context().run, args=(carry_out,), daemon=True).start()
    except (RuntimeError, MemoryError):  # there is no room for another thread
        carry_out()
    return done.wait
