"""One run, top to bottom: the story of the product."""

import platform
import shutil
from datetime import UTC, datetime

import structlog

from job.core.errors import Again, JobError, StopRequestedError, ending, exit_code
from job.core.report import Report
from job.edge import base_model
from job.edge.logs import bind, quiet_libraries
from job.stages.attempt import Attempt
from job.stages.identity import Run, find_run, probe_output

log = structlog.get_logger(__name__)


def run(attempt: Attempt) -> Report:
    """Carry a run to its committed report, or find that it is there already.

    Raises:
        JobError: the exit code of the table; what is committed stays committed.
    """
    with attempt.phases.phase("identify"):
        found = find_run(attempt)
    bind(run_id=found.artifacts.run_id)
    if found.done:
        attempt.standing.run_uri = found.artifacts.uri
        log.info("already_done", run_uri=found.artifacts.uri, message="this run is finished; nothing was done now")
        return Report.model_validate(found.artifacts.report())
    _look_at_output(attempt)
    begun = _Begun(attempt, found)
    try:
        report = _carry_out(attempt, found, begun)
    except BaseException as error:
        begun.end(error)
        if begun.number is None and ending(exit_code(error)).again is Again.NEVER:
            # Nobody comes back for it: a folder for each refused night would fill the disk.
            shutil.rmtree(attempt.workdir / "runs" / found.artifacts.run_id, ignore_errors=True)
        raise
    begun.end(None)
    return report


def _carry_out(attempt: Attempt, found: Run, begun: "_Begun") -> Report:
    """Fetch, encode, train, finish."""
    if found.begun:
        begun.begin()  # an unfinished run: this attempt counts from here
    with attempt.phases.phase("load_libraries"):
        # Here and not above: a finished run, a wrong recipe and --help answer without them.
        from job.stages.dataset import prepare_dataset
        from job.stages.finish import finish
        from job.stages.training import Setting, Training
        from job.tune.device import choose_device, device_name
        from job.tune.model import load_tokenizer, read_config, refuse_targets, shape_of
        from job.tune.track import refuse_trackers

        quiet_libraries()
        device = choose_device(attempt.device)
        attempt.standing.device = device_name(device)
    _poll(attempt)
    with attempt.phases.phase("fetch_base"):
        base = base_model.fetch(
            found.base,
            models_folder=attempt.models_folder,
            settings=attempt.settings,
            should_stop=attempt.should_stop,
            on_progress=lambda done, of: attempt.phases.progress(bytes=done, of=of),
        )
    config, tokenizer = read_config(base.folder), load_tokenizer(base.folder)
    refuse_targets(config, attempt.recipe.lora)
    refuse_trackers(attempt.recipe.track)
    dataset = prepare_dataset(attempt, found, tokenizer, positions=shape_of(config).positions)
    _poll(attempt)
    number = begun.begin()
    setting = Setting(
        base=base,
        tokenizer=tokenizer,
        dataset=dataset,
        artifacts=found.artifacts,
        attempt_number=number,
        device=device,
    )
    trained = Training(attempt, setting).run()
    return finish(attempt, setting, trained)


def _look_at_output(attempt: Attempt) -> None:
    with attempt.phases.phase("try_output"):
        found = probe_output(attempt)
    if not found.conditional:
        log.warning("no_conditional_writes", reason=found.reason)
        attempt.notes.append(f"two attempts at once could not be told apart: {attempt.hide(found.reason)}")


def _poll(attempt: Attempt) -> None:
    if attempt.should_stop():
        raise StopRequestedError("asked to stop before the first step")


class _Begun:
    """This attempt's two records in the store: that it began, and how it ended."""

    def __init__(self, attempt: Attempt, found: Run) -> None:
        self._attempt = attempt
        self._found = found
        self.number: int | None = None
        """Of the attempt; None before `begin`."""

    def begin(self) -> int:
        """Freeze the run if it is new, and take an attempt number; the second call returns the same one."""
        if self.number is None:
            artifacts = self._found.artifacts
            artifacts.begin_run(self._found.record)
            self._attempt.standing.run_uri = artifacts.uri
            self.number = artifacts.begin_attempt({"started": _now(), "host": platform.node()})
            bind(attempt=self.number)
            log.info("attempt", number=self.number, run_uri=artifacts.uri)
        return self.number

    def end(self, error: BaseException | None) -> None:
        """Leave word of how it ended; a store that cannot be reached now must not hide why."""
        if self.number is None:
            return
        standing = self._attempt.standing
        code = 0 if error is None else exit_code(error)
        facts = {
            "ended": _now(),
            "exit_code": code,
            "reason": "finished" if error is None else self._attempt.hide(f"{type(error).__name__}: {error}")[:2000],
            "device": standing.device,
            "from_step": standing.from_step,
            "last_committed_step": standing.last_committed_step,
            "phase_seconds": self._attempt.phases.seconds,
        }
        try:
            self._found.artifacts.end_attempt(self.number, facts)
        except JobError as trouble:
            log.warning("attempt_end_not_written", reason=str(trouble))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
