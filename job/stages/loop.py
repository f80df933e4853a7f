"""The loop of a run, top to bottom: evaluate and commit when due, commit when due, stop when asked, step."""

import math
import statistics
from dataclasses import dataclass, field
from typing import NoReturn

import structlog
import torch

from job.core.crash_points import crash_point
from job.core.data.packing import Rows
from job.core.errors import DivergedError, StopRequestedError
from job.core.judging.verdict import Evaluation, is_exhausted
from job.core.plan.course import Course
from job.core.plan.cut import MemoryPlan
from job.core.plan.memory import Placement
from job.stages.attempt import Attempt
from job.stages.base.base_source import loaded_from
from job.stages.base.loading import Inputs
from job.stages.committing import Committer
from job.stages.planning import Planned
from job.stages.resuming import Resumed
from job.stages.teller import StepTeller
from job.tune.device.device import allocation_retries, on_own_stream
from job.tune.engines.engine import shrink
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.checkpoint import AdapterToPublish, Progress
from job.tune.loop.evaluate import Question, evaluate
from job.tune.loop.step import StepCutShortError, Stepper
from job.tune.loop.step_record import Setbacks, StepRecord
from job.tune.world import ALONE, LOST, Order, World

log = structlog.get_logger(__name__)

_SETTLING_STEPS = 5
"""The first steps, of batches of unlike lengths, find the memory that they need."""


@dataclass(slots=True, kw_only=True)
class TrainingFacts:
    """What the report needs to know of the training."""

    progress: Progress
    course: Course
    memory: MemoryPlan
    """The plan at the start; the cut of the last step stands in the progress."""
    engine_reason: str
    """Why this engine computes the gradients."""
    left_to_peft: bool
    """Whether linear layers are PEFT's own."""
    rows: Rows
    """How documents stand in micro-batches."""
    questions: list[Question]
    architecture: str
    left_out: str | None
    """What of a multimodal base was not loaded; None: it is a language model alone."""
    form: str
    """What its linear layers are: in which 4 bits, how many, and which are not."""
    trainable_parameters: int
    total_parameters: int
    resumed: Resumed
    adapter: AdapterToPublish
    refused_by: tuple[str, ...] = ()
    """Servers that are known to refuse it, each with the reason."""
    step_seconds: list[float] = field(default_factory=list)
    """Each step of this attempt."""
    tokens: int = 0
    """Real ones of those steps."""
    start_seconds: dict[str, float] | None = None
    """From the process's start to the end of the attempt's first step, by phase; None: it made no step."""
    out_of_memory: int = 0
    recompilations: int = 0
    allocation_retries: int = 0
    nodes: int = 1
    placement: Placement = "replicated"
    waited_seconds: float = 0.0
    """Within the steps of this attempt, for other ranks: a rank's, on the average."""
    bytes_sent: int = 0
    """By each rank, in the steps of this attempt."""

    @property
    def resume_exact(self) -> bool:
        """Whether the numbers are to the bit those of an undisturbed run."""
        return not self.progress.changes

    @property
    def step_seconds_median(self) -> float:
        """0 when this attempt made no step."""
        return statistics.median(self.step_seconds) if self.step_seconds else 0.0


class Loop:
    """One attempt at a run's steps."""

    def __init__(  # noqa: PLR0913 - what a run's steps are made of
        self,
        attempt: Attempt,
        inputs: Inputs,
        planned: Planned,
        *,
        model: PackedModel,
        stepper: Stepper,
        committer: Committer,
        teller: StepTeller,
        facts: TrainingFacts,
        world: World = ALONE,
    ) -> None:
        self._attempt = attempt
        self._recipe = attempt.worker.recipe
        self._inputs = inputs
        self._planned = planned
        self._model = model
        self._stepper = stepper
        self._committer = committer
        self._teller = teller
        self._facts = facts
        self._world = world
        self._progress = facts.progress
        self._tokens = self._progress.cut.micro_batch_tokens
        """The micro-batch of the last step that was looked at."""
        self._memory_reported = False

    def run(self) -> None:
        """Carry the run to its last step, or to the end of its patience.

        Raises:
            StopRequestedError: asked to stop; the state is committed.
            DivergedError: a loss or gradient is not finite; the weights are those before that step.
            CannotFitError: one example alone does not fit the device.
            PeerLostError: another rank is gone; the state is committed, where the device still gives it.
        """
        progress, evaluation, checkpoint = self._progress, self._recipe.evaluate, self._recipe.checkpoint
        while True:
            last = progress.step == self._planned.course.steps
            due = last or progress.step % evaluation.every_steps == 0
            if due and progress.step not in progress.evaluations:
                self._evaluate_and_commit()
            elif due or progress.step % checkpoint.every_steps == 0 or self._committer.is_clock_due():
                self._commit()
            if last or is_exhausted(progress.evaluations, patience=evaluation.patience):
                return
            if self._attempt.worker.should_stop():
                self._stop()
            self._step(progress.step + 1)

    def _step(self, number: int) -> None:
        sent = self._world.bytes_sent
        try:
            self._world.order(Order.STEP, number)
            self._record(self._stepper.step(number, cut_short=self._committer.must_cut_step))
        except StepCutShortError as dropped:
            self._note(number, dropped.setbacks)
            self._stop()
        except LOST:
            self._save_without_the_others()
            raise
        self._facts.bytes_sent += self._world.bytes_sent - sent
        if self._facts.start_seconds is None:
            self._stepper.wait()  # this once: it compiled, and is what everybody waited for
            self._record_start()

    def _evaluate_and_commit(self) -> None:
        self._record(self._stepper.finish())
        result = self._evaluated()
        self._progress.evaluations[result.step] = result
        dataset = self._inputs.dataset
        self._teller.evaluation(result, dataset.losses_by_source(result), dataset.losses_by_slice(result))
        self._commit()

    def _commit(self) -> None:
        self._record(self._stepper.finish())
        try:
            self._settle()
        except LOST:
            self._save_without_the_others()
            raise
        self._committer.commit()

    def _settle(self) -> None:
        """What is committed, every rank has."""
        self._world.order(Order.SETTLE)
        self._facts.waited_seconds = self._stepper.settle()

    def _save_without_the_others(self) -> None:
        """They are gone, and the state after the last whole step is still here."""
        self._world.lose()
        try:
            self._record(self._stepper.finish())
        except LOST as error:
            log.warning("not_saved", reason=f"the device waits for a rank that is gone: {error}")
        else:
            with on_own_stream(self._inputs.device):  # what waits for them on the device holds the others' stream
                self._committer.commit()

    def _stop(self) -> NoReturn:
        self._commit()
        self._world.order(Order.STOP)
        if self._committer.has_nothing:
            raise StopRequestedError("asked to stop before there was anything to commit")
        raise StopRequestedError(
            f"asked to stop; step {self._progress.step} of {self._planned.course.steps} is committed"
        )

    # --- what a step was ---------------------------------------------------------------------------------------------

    def _record(self, record: StepRecord | None) -> None:
        if record is None:
            return
        self._facts.step_seconds.append(record.seconds)
        self._facts.tokens += record.tokens
        self._attempt.limits.cost.add_step(record.seconds)
        self._note(record.step, record.setbacks)
        self._notice_full_memory()
        self._teller.step(record)

    def _note(self, step: int, setbacks: Setbacks) -> None:
        """Counts what ran out of memory, and keeps with the run what made its numbers other ones."""
        self._facts.out_of_memory += len(setbacks.cuts)
        self._facts.recompilations += len(setbacks.recompilations)
        before, self._tokens = self._tokens, self._progress.cut.micro_batch_tokens
        if self._recipe.lora.dropout and self._tokens != before:
            self._progress.changes.append(
                f"memory ran out after step {step - 1}: smaller micro-batches draw other dropout masks"
            )
        if setbacks.compiler_failure is not None:
            reason = self._attempt.hide(setbacks.compiler_failure)
            self._progress.changes.append(f"after step {step - 1} layers ran as they are, no longer compiled: {reason}")

    def _record_start(self) -> None:
        spent = self._attempt.phases.so_far()
        spent["first_step"] = spent.pop("train")
        self._facts.start_seconds = {name: round(seconds, 3) for name, seconds in spent.items()}
        log.info(
            "start",
            seconds=round(sum(self._facts.start_seconds.values()), 3),
            base_from=loaded_from(self._inputs.base),
            spent=self._facts.start_seconds,
        )

    def _notice_full_memory(self) -> None:
        """While the first steps find their memory, it is asked for anew as a matter of course."""
        facts, device = self._facts, self._inputs.device
        before, facts.allocation_retries = facts.allocation_retries, allocation_retries(device)
        if (
            facts.allocation_retries > before
            and len(facts.step_seconds) > _SETTLING_STEPS
            and not self._memory_reported
        ):
            self._memory_reported = True
            reason = (
                "the GPU's memory is nearly full and in pieces: steps wait while it is given back and asked for anew. "
                "Another process may hold part of it; otherwise lower data.max_length"
            )
            log.warning("memory_in_pieces", retries=facts.allocation_retries, reason=reason)
            self._attempt.notes.append(reason)

    # --- the held-out examples ---------------------------------------------------------------------------------------

    def _evaluated(self) -> Evaluation:
        """In passes as large as fit; a stop drops what is judged so far and commits the rest."""
        planned = self._progress.cut.evaluation_tokens
        self._world.order(Order.EVALUATE, self._progress.step, planned)
        while True:
            try:
                return self._evaluate(planned)
            except LOST:
                self._save_without_the_others()
                raise
            except StopRequestedError:
                self._stop()
            except torch.OutOfMemoryError as error:
                # Its frames hold the activations that did not fit.
                failure = error.with_traceback(None)
                self._progress.cut = shrink(
                    self._planned.choice.engine,
                    self._progress.cut,
                    "evaluation",
                    longest=self._inputs.dataset.validation.max_length,
                    layers=self._planned.layers,
                    error=failure,
                )
                self._facts.out_of_memory += 1

    def _evaluate(self, planned_tokens: int) -> Evaluation:
        validation, step = self._inputs.dataset.validation, self._progress.step

        def on_progress(done: int) -> None:
            self._attempt.phases.progress(evaluated=done, of=len(validation))
            crash_point("evaluate.middle")

        with self._attempt.phases.phase("evaluate"):
            result = evaluate(
                self._model,
                validation,
                step=step,
                tokens_at_once=self._progress.cut.evaluation_tokens,
                should_stop=self._attempt.worker.should_stop,
                on_progress=on_progress,
                world=self._world,
                planned_tokens=planned_tokens,
            )
        if not math.isfinite(result.loss):
            # Nothing can be chosen by it, and no later step would heal it.
            worst = [validation.where(i) for i in range(len(validation)) if not math.isfinite(result.nll[i])]
            advice = "Lower train.learning_rate" if step else "No step was made: choose another model.base"
            raise DivergedError(
                f"step {step}: the validation loss is {result.loss}. {advice}, or look at the held-out examples "
                f"{', '.join(worst[:8])} ({len(worst)} in all)"
            )
        return result
