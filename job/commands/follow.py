"""What `run` is in every process of a run but the one that owns it: compute what that one orders."""

from contextlib import suppress
from typing import TYPE_CHECKING

from job.core.attempt.seat import Seat
from job.edge.host.logs import quiet_libraries
from job.edge.host.planted import refuse_planted
from job.stages.attempt import Attempt
from job.stages.attempts.guard import Guard
from job.stages.nightly.other_seed import at_other_seed

if TYPE_CHECKING:
    from job.stages.ranks.company import Company


def follow(attempt: Attempt, seat: Seat) -> None:
    """Take part until the run's report is committed, or there is nothing to do.

    Raises:
        JobError: the exit code of the table, of this process or of the one whose end has ended it.
    """
    with Guard(attempt):
        if seat.local_rank == 0:
            refuse_planted(attempt.worker.workdir)  # on a node of its own, before anybody writes there
        with attempt.phases.phase("load_libraries"):
            from job.stages.ranks.company import Company, OverError

            quiet_libraries()
        company = Company(attempt, seat)
        with suppress(OverError):
            while _follow_a_run(attempt, company):
                pass


def _follow_a_run(attempt: Attempt, company: "Company") -> bool:
    """Take part in one, or in a look at it; whether another one follows.

    Raises:
        OverError: there is none.
        JobError: as `follow`.
    """
    from job.stages.base.hardware import hardware_errors
    from job.stages.ranks.following import gather_as_others_did, obey, obey_in_a_look

    with company:
        with attempt.phases.phase("identify"):
            run, part = company.begun()
        mine = at_other_seed(attempt) if part == "other seed" else attempt
        inputs = gather_as_others_did(mine, company, run)
        with hardware_errors(inputs.device):
            (obey_in_a_look if part == "look" else obey)(mine, company, inputs)
    return part != "run"
