"""What a run starts from, and its night; of two trainings before either, so that no hours go into what is wrong."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from job.core.reports.report import Report
from job.stages.attempt import Attempt
from job.stages.attempts.guard import Guard
from job.stages.attempts.holding import Held
from job.stages.attempts.identity import Run
from job.stages.base.hardware import hardware_errors
from job.stages.base.loading import Inputs
from job.stages.finishing.pushing import refuse_unpushable
from job.stages.gathering import gather
from job.stages.nightly.night import Night, prepare_night
from job.stages.nightly.other_seed import train_other_seed
from job.stages.ranks.company import Company
from job.stages.ranks.placing import place_base
from job.tune.device.device import begin_peak_anew, release_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What the run itself starts from once the other training is done."""

    inputs: Inputs
    night: Night

    def after(self, other: Report, attempt: Attempt) -> "Looked":
        """The same, beside the other training; the base from the copy in 4 bits that it may have left."""
        release_memory(self.inputs.device)
        begin_peak_anew(self.inputs.device)  # the peak of what comes is compared with what was planned for it
        with attempt.phases.phase("fetch_weights"):
            base = self.inputs.source.fetch(attempt.phases.fetched)
        return Looked(inputs=replace(self.inputs, base=base), night=replace(self.night, other=other))


def look(attempt: Attempt, run: Run, begin: Callable[[], int], company: Company) -> Looked:
    """Gather what the run starts from, begin it, and prepare its night: new records are tested here, and once.

    Args:
        attempt: at the run itself.
        run: that is held.
        begin: takes the attempt's number.
        company: the other processes, who are needed where the base is sharded.

    Raises:
        JobError: as `gather` and `prepare_night`.
    """
    with company:
        company.begin(run, attempt, looks=True)
        refuse_unpushable(attempt)
        inputs = company.in_turn(lambda: place_base(attempt, gather(attempt, run, begin), company))
        company.loaded()  # nobody of this node need wait for a copy of the base: the training makes it
        with hardware_errors(inputs.device):
            night = prepare_night(attempt, run, inputs, company)
    assert night is not None, "two seeds go with a channel"
    return Looked(inputs=inputs, night=night)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run that is held starts from; it is gathered when it is asked for, where it was not looked at before."""

    attempt: Attempt
    held: Held
    looked: Looked | None
    """Of a run that is judged by two seeds."""

    def inputs(self, company: Company) -> Inputs:
        """Raises: as `gather` and `place_base`."""
        attempt, begin = self.attempt, self.held.records.begin
        known = None if self.looked is None else self.looked.inputs
        return company.in_turn(lambda: place_base(attempt, known or gather(attempt, self.held.run, begin), company))

    def night(self, inputs: Inputs, company: Company) -> Night | None:
        """None: the recipe names no channel. Raises: as `prepare_night`."""
        if self.looked is not None:
            return self.looked.night
        return prepare_night(self.attempt, self.held.run, inputs, company)


def start_of(
    attempt: Attempt, held: Held, guard: Guard, company: Company, carry_out: Callable[[Attempt, Held], Report]
) -> Start:
    """Of a run that is judged by two seeds with the other one trained, by `carry_out`."""
    looked = None
    if attempt.worker.recipe.promote.seeds > 1:
        looked = look(attempt, held.run, held.records.begin, company)
        looked = looked.after(train_other_seed(attempt, held.run, guard, carry_out), attempt)
    return Start(attempt=attempt, held=held, looked=looked)
