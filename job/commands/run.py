"""One run, top to bottom: the story of the product."""

import os
import platform
import shutil
from dataclasses import asdict, replace

import structlog

from job.core.crash_points import crash_point
from job.core.errors import Again, StopRequestedError, ending, exit_code
from job.core.report import Report
from job.edge.host.logs import bind, quiet_libraries
from job.edge.host.machine import look_at_machine
from job.stages.attempt import Attempt
from job.stages.guard import Guard, refuse_short_time
from job.stages.identity import Run, find_run, probe_output
from job.stages.records import Begun

log = structlog.get_logger(__name__)


def run(attempt: Attempt) -> Report:
    """Carry a run to its committed report, or find that it is there already.

    Raises:
        JobError: the exit code of the table; what is committed stays committed.
    """
    with Guard(attempt) as guard:
        with attempt.phases.phase("identify"):
            found = find_run(attempt)
        bind(run_id=found.artifacts.run_id)
        if found.done:
            return _already_done(attempt, found)
        # First of all that costs nothing: what cannot be written to is refused before the store hears of us.
        log.info("machine", **asdict(look_at_machine(attempt.workdir)))
        return _locked(attempt, found, guard)


def _locked(attempt: Attempt, found: Run, guard: Guard) -> Report:
    """Work on the run as its only attempt."""
    lock = found.artifacts.make_lock(
        lease_seconds=attempt.lease_seconds,
        owner={"host": platform.node(), "pid": os.getpid()},
        conditional=_look_at_output(attempt),
        on_lost=lambda: attempt.ask_to_stop("another attempt has taken the run over"),
    )
    with attempt.phases.phase("lock"):
        lock.acquire(above=max(found.artifacts.attempt_numbers(), default=0), should_stop=attempt.moves_on)
    crash_point("lock.acquired")
    artifacts = found.artifacts.under(lock)
    # What was seen before the lock was ours may have changed since.
    found = replace(found, artifacts=artifacts, begun=artifacts.run_record() is not None)
    begun = Begun(attempt, found, lock)
    guard.understood, guard.end_records = begun.understood, begun.end
    try:
        if artifacts.report() is not None:
            report = _already_done(attempt, found)
        else:
            artifacts.take_over()
            begun.refuse_repeated_failure()
            refuse_short_time(attempt)  # only now: who never has enough of it is stopped in vain, which is counted
            report = _carry_out(attempt, found, begun)
    except BaseException as error:
        ended = begun.understood(error)
        begun.end(ended)
        if begun.number is None and ending(exit_code(ended)).again is Again.NEVER:
            # Nobody comes back for it: a folder for each refused night would fill the disk.
            shutil.rmtree(attempt.workdir / "runs" / found.artifacts.run_id, ignore_errors=True)
        if ended is error:
            raise
        raise ended from error
    begun.end(None)
    return report


def _already_done(attempt: Attempt, found: Run) -> Report:
    attempt.standing.run_uri = found.artifacts.uri
    log.info("already_done", run_uri=found.artifacts.uri, message="this run is finished; nothing was done now")
    return Report.model_validate(found.artifacts.report())


def _carry_out(attempt: Attempt, found: Run, begun: Begun) -> Report:
    """Fetch, encode, train, finish."""
    if found.begun:
        begun.begin()  # an unfinished run: this attempt counts from here
    with attempt.phases.phase("load_libraries"):
        # Here and not above: a finished run, a wrong recipe and --help answer without them.
        from job.stages.base_source import BaseSource
        from job.stages.dataset import prepare_dataset
        from job.stages.finish import finish
        from job.stages.hardware import hardware_errors, look_at_hardware
        from job.stages.training import Setting, Training
        from job.tune.loop.track import refuse_trackers
        from job.tune.model.adapter import refuse_targets
        from job.tune.model.config import load_tokenizer, read_config, shape_of

        quiet_libraries()
    _poll(attempt)
    device = look_at_hardware(attempt)
    _poll(attempt)
    source = BaseSource(
        found.base,
        attempt.recipe.model,
        device=device,
        models_folder=attempt.models_folder,
        settings=attempt.settings,
        should_stop=attempt.should_stop,
    )
    crash_point("fetch_base.before")
    with attempt.phases.phase("fetch_base"):
        small = source.fetch_small(attempt.phases.brought)
    config, tokenizer = read_config(small), load_tokenizer(small)
    refuse_targets(config, attempt.recipe.lora)
    refuse_trackers(attempt.recipe.track)
    dataset = prepare_dataset(attempt, found, tokenizer, positions=shape_of(config).positions)
    _poll(attempt)
    # After the data, which is small beside them: a wrong line is told before gigabytes move.
    with attempt.phases.phase("fetch_weights"):
        base = source.fetch(attempt.phases.brought)
    number = begun.begin()
    setting = Setting(
        base=base,
        source=source,
        tokenizer=tokenizer,
        dataset=dataset,
        artifacts=found.artifacts,
        attempt_number=number,
        device=device,
    )
    with hardware_errors(device):
        trained = Training(attempt, setting).run()
        return finish(attempt, setting, trained)


def _look_at_output(attempt: Attempt) -> bool:
    """Whether the store keeps conditions on writes."""
    with attempt.phases.phase("try_output"):
        found = probe_output(attempt)
    if not found.conditional:
        log.warning("no_conditional_writes", reason=found.reason)
        attempt.notes.append(
            "the store does not keep conditions on writes, so the lock was a lease that is read back: attempts that "
            f"begin in the same two seconds may both work ({attempt.hide(found.reason)})"
        )
    return found.conditional


def _poll(attempt: Attempt) -> None:
    if attempt.should_stop():
        raise StopRequestedError("asked to stop before the first step")
