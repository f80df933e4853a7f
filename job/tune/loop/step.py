"""The training loop, top to bottom: evaluate, step, commit, until the course is done."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from job.core.course import Course
from job.core.crash_points import crash_point
from job.core.errors import CannotFitError, DivergedError, StopRequestedError
from job.core.packing import pack_evenly
from job.core.recipe import CheckpointSection, EvaluateSection, TrainSection
from job.core.verdict import Evaluation, is_exhausted
from job.tune.data.documents import Documents
from job.tune.data.micro_batch import MicroBatch, micro_batch
from job.tune.device.random_state import random_state, restore_random_state
from job.tune.engines.engine import Path, settle
from job.tune.engines.padding import grain_of
from job.tune.loop.checkpoint import Trained
from job.tune.loop.flat import FlatAdapter

_NAMED_EXAMPLES = 64
"""Of a step that went wrong: more would make a message that nobody reads."""
_SMALL = 4096
"""Tokens of a micro-batch: with fewer, products are too short to be fast, and decoding weights at each use costs less.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step did, as it is logged."""

    step: int
    of: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    """Real tokens of the step."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the loop calls; it knows neither the store nor the log."""

    should_stop: Callable[[], bool]
    evaluate: Callable[[int, int], Evaluation]
    """(step, tokens of a pass) -> held-out result."""
    on_first_step: Callable[[], None]
    """Told once, when the first step of this attempt is done on the device."""
    on_step: Callable[[StepRecord], None]
    on_evaluation: Callable[[Evaluation], None]
    on_checkpoint: Callable[[], None]
    """Commits the state as it stands, between two steps."""
    is_commit_due: Callable[[int], bool]
    """Steps since the last commit -> whether the clock asks for one before the recipe does."""
    on_micro_batch: Callable[[], None]
    """Told that training moves."""
    must_cut_step: Callable[[], bool]
    """Whether the step under way must be dropped: a stop was asked for, and saving needs what time is left."""
    on_out_of_memory: Callable[[dict[str, Any]], None]
    """Told the smaller plan that the batch is tried with again."""


class _StepCutError(Exception):
    """The step under way is dropped; the weights are those before it."""


@dataclass(slots=True, kw_only=True)
class _Unread:
    """A step whose numbers are still on their way from the device."""

    step: int
    numbers: Tensor
    """Loss and gradient norm, on the host: [2] fp32; there once `ended` is past."""
    learning_rate: float
    tokens: int
    began: "Mark"
    ended: "Mark"


class Trainer:
    """One attempt at a run's steps."""

    def __init__(
        self,
        *,
        path: Path,
        adapter: FlatAdapter,
        trained: Trained,
        documents: Documents,
        course: Course,
        accelerator: Accelerator,
        train: TrainSection,
        hooks: Hooks,
    ) -> None:
        self._path = path
        self._trained = trained
        self._documents = documents
        self._course = course
        self._accelerator = accelerator
        self._adapter = adapter
        self._max_grad_norm = train.max_grad_norm
        self._hooks = hooks
        self._lengths = documents.lengths
        self._targets = documents.targets
        self._unread: _Unread | None = None
        self._mark: Mark | None = None
        self._begun = False
        """Whether this attempt has made a step."""
        self._committed = self._state()

    def _state(self) -> tuple[int, int]:
        """What a checkpoint would add: a step, or an evaluation."""
        return self._trained.progress.step, len(self._trained.progress.evaluations)

    def run(self, checkpoint: CheckpointSection, evaluation: EvaluateSection) -> None:
        """Carry the run to its last step, or to the end of its patience; the model is in training mode.

        Raises:
            StopRequestedError: asked to stop; the state is committed.
            DivergedError: a loss or gradient is not finite; the weights are those before that step.
            CannotFitError: one example alone does not fit the device.
        """
        progress, hooks = self._trained.progress, self._hooks
        self._adapter.clear()  # whatever was tried before
        while True:
            last = progress.step == self._course.steps
            due = last or progress.step % evaluation.every_steps == 0
            if due and progress.step not in progress.evaluations:
                self._read()
                self._evaluate()
            elif due or progress.step % checkpoint.every_steps == 0 or self._is_clock_due():
                self._commit()
            if last or is_exhausted(progress.evaluations, patience=evaluation.patience):
                return
            if hooks.should_stop():
                self._stop()
            self._step(progress.step + 1)
            if not self._begun and self._mark is not None:
                self._begun = True
                _wait(self._mark)  # this once: it compiled, and is what everybody waited for
                hooks.on_first_step()

    def _evaluate(self) -> None:
        progress, result = self._trained.progress, None
        while result is None:
            try:
                result = self._hooks.evaluate(progress.step, progress.plan["evaluation_tokens"])
            except StopRequestedError:
                self._stop()
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # as in a step
                self._shrink(progress.plan, "evaluation_tokens", self._documents.max_length, failure)
        progress.evaluations[progress.step] = result
        self._hooks.on_evaluation(result)
        self._commit()

    def _commit(self) -> None:
        self._read()
        if self._state() != self._committed:
            self._hooks.on_checkpoint()
            self._committed = self._state()
        self._mark = None  # the time since the last step was not training

    def _is_clock_due(self) -> bool:
        return self._hooks.is_commit_due(self._trained.progress.step - self._committed[0])

    def _stop(self) -> NoReturn:
        self._commit()
        if self._committed == (0, 0):
            raise StopRequestedError("asked to stop before there was anything to commit")
        msg = f"asked to stop; step {self._trained.progress.step} of {self._course.steps} is committed"
        raise StopRequestedError(msg)

    def _step(self, step: int) -> None:
        """One optimizer step. Nothing here waits for its own numbers: they are read one step later."""
        began = self._mark or _mark(self._accelerator.device)
        batch = self._course.batch(step)
        loss = self._backward(batch)
        grad_norm = self._accelerator.clip_grad_norm_(self._adapter.vectors, self._max_grad_norm)
        # Before the update: when the step before was not finite, the optimizer's state is spoilt and nothing may move.
        self._read()
        rate = self._trained.scheduler.get_last_lr()[0]
        numbers = torch.stack([loss, grad_norm])
        crash_point("step.before_update")
        self._update(torch.isfinite(numbers).all())
        crash_point("step.after_update")
        # Copied, not read: reading waits for all that was asked of the device, this copy only for what came before it.
        numbers = numbers.to("cpu", non_blocking=True)
        self._mark = _mark(self._accelerator.device)
        self._unread = _Unread(
            step=step,
            numbers=numbers,
            learning_rate=rate,
            tokens=int(self._lengths[batch].sum()),
            began=began,
            ended=self._mark,
        )
        self._trained.progress.step = step

    def _update(self, finite: Tensor) -> None:
        """Step the optimizer; where a number is not finite the weights stay as they were, decided on the device."""
        before = [vector.detach().clone() for vector in self._adapter.vectors]
        self._trained.optimizer.step()
        for vector, old in zip(self._adapter.vectors, before, strict=True):
            torch.where(finite, vector.data, old, out=vector.data)
        self._adapter.clear()
        self._path.refresh()
        self._trained.scheduler.step()

    def _backward(self, batch: Sequence[int]) -> Tensor:
        """Loss and gradients of a batch: the sum over all its targets, divided by their number.

        When memory runs out the batch is done again in smaller micro-batches, which changes no sum.
        """
        plan = self._trained.progress.plan
        before = random_state()
        while True:
            try:
                return self._accumulate(batch, plan["micro_batch_tokens"])
            except _StepCutError:
                self._adapter.clear()
                restore_random_state(before)
                self._stop()
            except torch.OutOfMemoryError as error:
                # Its frames hold the activations that did not fit.
                failure = error.with_traceback(None)
                self._adapter.clear()
                restore_random_state(before)
                self._shrink(plan, "micro_batch_tokens", int(self._lengths[batch].max()), failure)

    def _accumulate(self, batch: Sequence[int], budget: int) -> Tensor:
        targets = int(self._targets[batch].sum())
        total = torch.zeros((), device=self._accelerator.device)
        lengths = self._lengths[batch].tolist()
        for members in pack_evenly(lengths, most=max(budget, *lengths), grain=grain_of(budget)):
            part = self._micro_batch([batch[i] for i in members])
            total += self._path.accumulate(part, targets=targets).sum() / targets
            crash_point("step.middle")
            self._hooks.on_micro_batch()
            if self._hooks.must_cut_step():
                raise _StepCutError
        return total

    def _micro_batch(self, members: Sequence[int]) -> MicroBatch:
        return micro_batch(self._documents, members).to(self._accelerator.device)

    def _shrink(self, plan: dict[str, Any], of: str, longest: int, error: torch.OutOfMemoryError) -> None:
        """Halve what is done at once, give up decoded weights, halve on, compute activations again, or fail."""
        torch.cuda.empty_cache()
        if plan[of] > max(longest, _SMALL):
            plan[of] = max(longest, _SMALL, plan[of] // 2)
        elif (saved := self._path.give_up_weights()) is not None:
            plan |= saved
        elif plan[of] > longest:
            plan[of] = max(longest, plan[of] // 2)
        elif (saved := self._path.compute_again()) is not None:
            plan |= saved
        else:
            msg = (
                f"one example of {longest} tokens does not fit this GPU, even with activations computed again; "
                "lower data.max_length, or use a GPU with more memory"
            )
            raise CannotFitError(msg) from error
        settle(self._path, plan)
        self._hooks.on_out_of_memory(dict(plan))

    def _read(self) -> None:
        """Bring the last step's numbers to the host, and end the run when they are not finite."""
        unread, self._unread = self._unread, None
        if unread is None:
            return
        _wait(unread.ended)
        loss, grad_norm = unread.numbers.tolist()
        progress = self._trained.progress
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            progress.step = unread.step - 1
            batch = self._course.batch(unread.step)
            where = ", ".join(self._documents.where(d) for d in batch[:_NAMED_EXAMPLES])
            msg = (
                f"step {unread.step}: the loss is {loss} and the gradient norm {grad_norm}; the update was not "
                f"applied. Lower train.learning_rate, or look at the examples of this step ({len(batch)} in all): "
                f"{where}"
            )
            raise DivergedError(msg)
        seconds = _seconds(unread.began, unread.ended)
        progress.losses.append(loss)
        progress.grad_norms.append(grad_norm)
        progress.learning_rates.append(unread.learning_rate)
        progress.tokens += unread.tokens
        progress.seconds += seconds
        self._hooks.on_step(
            StepRecord(
                step=unread.step,
                of=self._course.steps,
                loss=loss,
                grad_norm=grad_norm,
                learning_rate=unread.learning_rate,
                tokens=unread.tokens,
                seconds=seconds,
            )
        )


Mark = float | torch.cuda.Event
"""A moment: on the GPU's own clock where there is one, so that taking it waits for nothing."""


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch has no types here
    event.record()
    return event


def _wait(mark: Mark) -> None:
    if not isinstance(mark, float):
        mark.synchronize()


def _seconds(began: Mark, ended: Mark) -> float:
    if isinstance(began, float) or isinstance(ended, float):
        return float(ended) - float(began)  # type: ignore[arg-type] # both are of one kind
    return float(began.elapsed_time(ended)) / 1000
