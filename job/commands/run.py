"""One run, top to bottom: the story of the product."""

from dataclasses import asdict
from functools import partial

import structlog

from job.core.attempt.seat import Seat
from job.core.reports.report import Report
from job.edge.host.logs import bind, quiet_libraries
from job.edge.host.machine import look_at_machine
from job.edge.host.planted import refuse_planted
from job.stages.attempt import Attempt
from job.stages.attempts.guard import Guard, refuse_short_time
from job.stages.attempts.holding import Held, hold
from job.stages.attempts.identity import Run, find_run
from job.stages.finishing.pushing import push, refuse_unpushable
from job.stages.nightly.channel_changes import keep_in_order
from job.stages.nightly.late_files import named_late
from job.stages.nightly.other_seed import Companions

log = structlog.get_logger(__name__)


def run(attempt: Attempt, seat: Seat | None = None) -> Report:
    """Carry a run to its committed report, or find that it is there already.

    Args:
        attempt: this process.
        seat: among the processes that work on the run; None: there is no other.

    Raises:
        JobError: the exit code of the table; what is committed stays committed.
    """
    worker, run_id, companions = attempt.worker, attempt.run_id, Companions(attempt, seat)
    attempt.standing.ranks = 1 if seat is None else seat.size
    with Guard(attempt) as guard:
        with attempt.phases.phase("identify"):
            found = find_run(worker.recipe, run_id=run_id, settings=worker.settings, should_stop=worker.should_stop)
        bind(run_id=found.artifacts.run_id)
        attempt.standing.late = named_late(found.sides.late)  # also of a night that has nothing to do
        if found.done:
            return _already_done(attempt, found)
        # First of all that costs nothing: what cannot be written to is refused before the store hears of us.
        log.info("machine", **asdict(look_at_machine(worker.workdir)))
        refuse_planted(worker.workdir)
        with hold(attempt, found, guard) as held:
            if held.run.done:
                return _already_done(attempt, held.run)
            held.records.refuse_repeated_failure()
            refuse_short_time(attempt)  # only now: who never has enough of it is stopped in vain, which is counted
            return _carry_out(attempt, held, companions, guard)


def _carry_out(attempt: Attempt, held: Held, companions: Companions, guard: Guard) -> Report:
    """Gather what training starts from, train, finish; push last, for the run is done without it.

    The other processes are let go only then: what cannot be pushed ends all of them with the same code. A run that is
    judged by two seeds is begun and looked at first, then the other one is trained, then itself: so what is wrong with
    the night is found before either, and whatever ends it in between, the next start finds it unfinished.
    """
    if held.run.begun:
        held.records.begin()  # an unfinished run: this attempt counts from here
    with attempt.phases.phase("load_libraries"):
        # Here and not above: a finished run, a wrong recipe and --help answer without them.
        from job.stages.base.hardware import hardware_errors
        from job.stages.finishing.finish import finish
        from job.stages.nightly.looking import start_of
        from job.stages.tracking import Tracked
        from job.stages.training import TrainingStage

        quiet_libraries()
    carry_out = partial(_carry_out, companions=companions, guard=guard)
    start = start_of(attempt, held, guard, companions.company, carry_out)
    with companions.company as company:
        company.begin(held.run, attempt)
        refuse_unpushable(attempt)
        inputs = start.inputs(company)
        with hardware_errors(inputs.device), Tracked(attempt, inputs) as tracked:
            night = start.night(inputs, company)
            facts = TrainingStage(attempt, inputs, company, tracked).run()
            report = finish(attempt, inputs, facts, tracked, night, company.world)
            return push(attempt, inputs.artifacts, report)


def _already_done(attempt: Attempt, found: Run) -> Report:
    attempt.runs_at(found.artifacts.uri)
    keep_in_order(attempt, found)
    log.info("already_done", run_uri=found.artifacts.uri, message="this run is finished; nothing was done now")
    report = found.artifacts.read_report()
    assert report is not None, "it is done"
    return push(attempt, found.artifacts, report)
