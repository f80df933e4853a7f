"""What `run` is in every process of a run but the one that owns it: compute what that one orders."""

from job.core.seat import Seat
from job.edge.host.logs import quiet_libraries
from job.edge.host.planted import refuse_planted
from job.stages.attempt import Attempt
from job.stages.guard import Guard


def follow(attempt: Attempt, seat: Seat) -> None:
    """Take part until the run's report is committed, or there is nothing to do.

    Raises:
        JobError: the exit code of the table, of this process or of the one whose end has ended it.
    """
    with Guard(attempt):
        if seat.local_rank == 0:
            refuse_planted(attempt.worker.workdir)  # on a node of its own, before anybody writes there
        with attempt.phases.phase("load_libraries"):
            from job.stages.company import Company, OverError
            from job.stages.following import gather_as_others_did, obey
            from job.stages.hardware import hardware_errors

            quiet_libraries()
        with Company(attempt, seat) as company:
            try:
                inputs = gather_as_others_did(attempt, company)
            except OverError:
                return
            with hardware_errors(inputs.device):
                obey(attempt, company, inputs)
