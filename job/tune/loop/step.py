"""One optimizer step: its micro-batches, its update, its numbers, which are read one step late."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import structlog
import torch
from accelerate import Accelerator
from torch import Tensor

from job.core.crash_points import crash_point
from job.core.errors import DivergedError
from job.core.plan.course import Course, dropout_seed
from job.core.plan.dealing import deal
from job.core.plan.shares import cut_share
from job.core.recipe.schema import TrainSection
from job.tune.data.documents import Documents
from job.tune.data.micro_batch import MicroBatch, micro_batch
from job.tune.engines.engine import Engine, adopt_or_shrink, shrink
from job.tune.loop.checkpoint import State
from job.tune.loop.flat import FlatAdapter
from job.tune.loop.gradient_sum import GradientSum
from job.tune.loop.marks import Mark, seconds_between, take_mark, wait_for
from job.tune.loop.sharing import settle
from job.tune.loop.step_record import Setbacks, StepRecord
from job.tune.world import ALONE, World

log = structlog.get_logger(__name__)

_NAMED_EXAMPLES = 64
"""Examples that the message about a diverged step names: nobody reads a longer one."""


class StepCutShortError(Exception):
    """The step under way was dropped on request; weights and optimizer are those before it."""

    def __init__(self, setbacks: Setbacks) -> None:
        """With the setbacks of the step until then."""
        super().__init__("dropped on request")
        self.setbacks = setbacks


def go_on() -> bool:
    """A `cut_short` that lets each step run to its end."""
    return False


@dataclass(slots=True, kw_only=True)
class _Unread:
    """A step whose numbers are still on their way from the device."""

    step: int
    numbers: Tensor
    """[2 + sources] fp32 on the host: loss, gradient norm, and where there are several sources the loss of each one's
    targets, summed; valid once `ended` has passed."""
    source_targets: tuple[int, ...]
    """Targets of each source; empty where there is one."""
    learning_rate: float
    tokens: int
    began: Mark
    ended: Mark
    waited: tuple[Mark, Mark] | None
    """From our own share's end until the sums over all ranks stand; None: we are alone."""
    setbacks: Setbacks


class Stepper:
    """Moves the state of a run step by step; it knows neither the store nor who reads its records."""

    def __init__(  # noqa: PLR0913 - what a step is made of
        self,
        *,
        engine: Engine,
        adapter: FlatAdapter,
        state: State,
        documents: Documents,
        course: Course,
        accelerator: Accelerator,
        train: TrainSection,
        layers: int,
        world: World = ALONE,
    ) -> None:
        """Take over a state whose cut the engine has adopted.

        Args:
            engine: computes the gradients.
            adapter: holds what is trained; its gradients are cleared.
            state: is updated by each step.
            documents: to train on.
            course: which of them make each step.
            accelerator: clips the gradients.
            train: the recipe's section.
            layers: number of the decoder's layers.
            world: who else makes each step.
        """
        self._engine = engine
        self._adapter = adapter
        self._state = state
        self._documents = documents
        self._course = course
        self._accelerator = accelerator
        self._train = train
        self._layers = layers
        self._world = world
        self._sum = None if world.size == 1 else GradientSum(world, adapter)
        self._has_met = False
        """Whether all ranks have said that they end the step under way."""
        self._lengths = documents.lengths
        self._targets = documents.targets
        self._source_of = documents.sources
        self._sources = int(documents.sources.max(initial=0)) + 1
        self._unread: _Unread | None = None
        self._mark: Mark | None = None
        """When the last step ended; None: the time since was not training."""
        self._waited: tuple[Mark, Mark] | None = None
        self._waited_seconds = 0.0
        """In all steps so far, for other ranks and for sums that were not made meanwhile."""
        self._setbacks = Setbacks()
        """Those of the step under way."""
        self._recompilations = 0
        """Of the engine's, those that were noticed."""
        adapter.clear()  # what was tried before left gradients
        if self._sum is not None:
            engine.watch(self._sum.on_finished)

    def compile_ahead(self, number: int) -> None:
        """Compile what the steps run, where layers are compiled, by the longest example of a step.

        Raises:
            CannotFitError: that example does not fit the device.
        """
        batch = self._course.batch(number)
        longest = max(batch, key=lambda document: int(self._lengths[document]))
        part = micro_batch(self._documents, [longest]).to(self._accelerator.device)
        while True:
            try:
                self._engine.compile_ahead(part)
                break
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # as in `_backward`
                self._adapter.clear()
                self._shrink(int(self._lengths[longest]), failure)
        self._adapter.clear()
        self._notice_compiler()

    def step(self, number: int, *, cut_short: Callable[[], bool] = go_on) -> StepRecord | None:
        """One optimizer step. Nothing here waits for its own numbers: they are read one step later.

        Args:
            number: from 1.
            cut_short: asked after each micro-batch, with other ranks for the last time before the last one; true drops
                the step.

        Returns:
            The record of the step before; None: there is none, or it was read already.

        Raises:
            StepCutShortError: `cut_short` was true, here or on another rank; weights and optimizer are those before
                the step.
            PeerLostError: another rank is gone; weights and optimizer are those before the step.
            DivergedError: the step before is not finite; the weights are those before it.
            CannotFitError: one example alone does not fit the device.
        """
        began = self._mark or take_mark(self._accelerator.device)
        batch = self._course.batch(number)
        loss, by_source = self._gradients(number, batch, cut_short)
        grad_norm = self._accelerator.clip_grad_norm_(self._adapter.vectors, self._train.max_grad_norm)
        # Before the update: when the step before was not finite, the optimizer's state is spoilt and nothing may move.
        record = self._read()
        rate = self._state.scheduler.get_last_lr()[0]
        numbers = torch.cat([torch.stack([loss, grad_norm]), by_source])
        crash_point("step.before_update")
        self._update(torch.isfinite(numbers).all())
        crash_point("step.after_update")
        # Copied now, read one step later: reading from the device then would wait for all that is queued by then.
        numbers = numbers.to("cpu", non_blocking=True)
        self._mark = take_mark(self._accelerator.device)
        self._unread = _Unread(
            step=number,
            numbers=numbers,
            source_targets=self._source_targets(batch),
            learning_rate=rate,
            tokens=int(self._lengths[batch].sum()),
            began=began,
            ended=self._mark,
            waited=self._waited,
            setbacks=self._setbacks,
        )
        self._setbacks = Setbacks()
        self._state.progress.step = number
        return record

    def wait(self) -> None:
        """Wait until the device has done the last step."""
        if self._mark is not None:
            wait_for(self._mark, self._world)

    def finish(self) -> StepRecord | None:
        """Wait for the last step and return its record; the time until the next step is not training.

        Raises:
            DivergedError: it is not finite; the weights are those before it.
        """
        record = self._read()
        self._mark = None
        return record

    def settle(self) -> float:
        """Between two steps: compare the ranks' adapters, and cut batches from here on as all of them can.

        Returns:
            Seconds that a rank has waited for others in its steps, on the average.

        Raises:
            SickDeviceError: an adapter is another one.
            PeerLostError: another rank is gone.
        """
        progress = self._state.progress
        cut, waited = settle(self._world, self._adapter, progress.cut, waited_seconds=self._waited_seconds)
        if cut != progress.cut:
            log.info("smaller_cut", reason="another rank has less memory", **asdict(cut))
            progress.cut = adopt_or_shrink(self._engine, cut)
        return waited

    def _update(self, finite: Tensor) -> None:
        """Step the optimizer; where a number is not finite the weights stay as they were, decided on the device."""
        before = [vector.detach().clone() for vector in self._adapter.vectors]
        self._state.optimizer.step()
        for vector, old in zip(self._adapter.vectors, before, strict=True):
            torch.where(finite, vector.data, old, out=vector.data)
        self._adapter.clear()
        self._engine.refresh()
        self._state.scheduler.step()

    def _source_targets(self, batch: Sequence[int]) -> tuple[int, ...]:
        if self._sources == 1:
            return ()
        counts = np.zeros(self._sources, dtype=np.int64)
        np.add.at(counts, self._source_of[batch], self._targets[batch])
        return tuple(counts.tolist())

    def _gradients(self, number: int, batch: Sequence[int], cut_short: Callable[[], bool]) -> tuple[Tensor, Tensor]:
        """Loss and gradients of a batch: the sum over all its targets, divided by their number; and each source's sum.

        Each rank computes those of its share, cut as its own memory asks; then they are summed.
        """
        targets, device = int(self._targets[batch].sum()), self._accelerator.device
        if self._sum is None:
            return self._backward(number, batch, targets, cut_short)
        shares = deal(self._lengths[batch].tolist(), shares=self._world.size)
        own = [batch[place] for place in shares[self._world.rank]]
        self._has_met = False
        loss, by_source = self._backward(number, own, targets, cut_short)
        done = take_mark(device)
        self._sum.begin_rest()
        self._world.sum_in_order([sums := torch.cat([loss.view(1), by_source])])
        self._sum.finish()
        self._waited = done, take_mark(device)
        return sums[0], sums[1:]

    def _meet(self, *, go: bool) -> None:
        """Once in a step, before the last micro-batch of our share: from then on all ranks end it.

        Raises:
            StepCutShortError: it is dropped, here or on another rank.
        """
        if self._sum is None or self._has_met:
            return
        self._has_met = True
        if not self._world.agree(go=go):
            raise StepCutShortError(self._setbacks)
        self._sum.begin()

    def _backward(
        self, number: int, batch: Sequence[int], targets: int, cut_short: Callable[[], bool]
    ) -> tuple[Tensor, Tensor]:
        """Loss and gradients of our share of a step with so many targets.

        When memory runs out it is tried anew in smaller micro-batches, which changes no sum.
        """
        while True:
            try:
                return self._accumulate(number, batch, targets, cut_short)
            except StepCutShortError:
                self._adapter.clear()
                raise
            except torch.OutOfMemoryError as error:
                # Its frames hold the activations that did not fit.
                failure = error.with_traceback(None)
                if self._sum is not None and self._has_met:
                    self._sum.put_aside()
                self._adapter.clear()
                self._shrink(int(self._lengths[batch].max()), failure)

    def _accumulate(
        self, number: int, batch: Sequence[int], targets: int, cut_short: Callable[[], bool]
    ) -> tuple[Tensor, Tensor]:
        device = self._accelerator.device
        total = torch.zeros((), device=device)
        by_source = torch.zeros(self._sources if self._sources > 1 else 0, device=device)
        lengths, budget = self._lengths[batch].tolist(), self._state.progress.cut.micro_batch_tokens
        packs = cut_share(lengths, budget)
        for place, members in enumerate(packs):
            if place == len(packs) - 1:
                self._meet(go=True)
            part = micro_batch(self._documents, [batch[i] for i in members]).to(device)
            seed = dropout_seed(self._train.seed, number, place, rank=self._world.rank)
            losses = self._engine.accumulate(part, targets=targets, seed=seed)
            total += losses.sum() / targets
            if self._sources > 1:
                by_source += self._by_source(losses, part)
            self._notice_compiler()
            crash_point("step.middle")
            if not self._has_met and cut_short():
                self._meet(go=False)
                raise StepCutShortError(self._setbacks)
        if not packs:
            self._meet(go=True)
        return total, by_source

    def _by_source(self, losses: Tensor, part: MicroBatch) -> Tensor:
        """[sources]: summed loss of each one's targets, in an order that does not change from run to run."""
        owners = torch.from_numpy(np.repeat(self._source_of[list(part.documents)], part.target_counts))
        pinned = owners.pin_memory() if losses.is_cuda else owners
        here = pinned.to(losses.device, non_blocking=True)
        every = torch.arange(self._sources, device=losses.device)
        return torch.where(here[None] == every[:, None], losses.float(), 0.0).sum(dim=1)

    def _notice_compiler(self) -> None:
        """Note what it did; a failure in the cut: an attempt that resumes must not compile and round differently."""
        progress, failure = self._state.progress, self._engine.compiler_failure
        if failure is not None and progress.cut.compiled:
            log.warning("layers_no_longer_compiled", reason=failure)
            progress.cut = replace(progress.cut, compiled=False)
            self._setbacks = replace(self._setbacks, compiler_failure=failure)
        for reason in self._engine.recompilations[self._recompilations :]:
            log.warning("layers_compiled_again", reason=reason)
            self._setbacks = replace(self._setbacks, recompilations=(*self._setbacks.recompilations, reason))
        self._recompilations = len(self._engine.recompilations)

    def _shrink(self, longest: int, error: torch.OutOfMemoryError) -> None:
        cut = shrink(self._engine, self._state.progress.cut, "step", longest=longest, layers=self._layers, error=error)
        self._state.progress.cut = cut
        self._setbacks = replace(self._setbacks, cuts=(*self._setbacks.cuts, cut))

    def _read(self) -> StepRecord | None:
        """The last step's record, waited for; raises when its numbers are not finite."""
        unread = self._unread
        if unread is None:
            return None
        wait_for(unread.ended, self._world)
        self._unread = None  # not before: a step that never ended is not the last whole one
        loss, grad_norm, *by_source = unread.numbers.tolist()
        progress = self._state.progress
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            progress.step = unread.step - 1
            raise self._diverged(unread.step, loss, grad_norm)
        seconds = seconds_between(unread.began, unread.ended)
        progress.losses.append(loss)
        progress.grad_norms.append(grad_norm)
        progress.learning_rates.append(unread.learning_rate)
        if by_source:
            means = [nats / n if n else None for nats, n in zip(by_source, unread.source_targets, strict=True)]
            progress.source_losses.append(means)
        progress.tokens += unread.tokens
        progress.seconds += seconds
        self._waited_seconds += 0.0 if unread.waited is None else seconds_between(*unread.waited)
        return StepRecord(
            step=unread.step,
            of=self._course.steps,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=unread.learning_rate,
            tokens=unread.tokens,
            seconds=seconds,
            setbacks=unread.setbacks,
        )

    def _diverged(self, step: int, loss: float, grad_norm: float) -> DivergedError:
        batch = self._course.batch(step)
        where = ", ".join(self._documents.where(d) for d in batch[:_NAMED_EXAMPLES])
        return DivergedError(
            f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; the update was not applied. Lower "
            f"train.learning_rate, or look at the examples of this step ({len(batch)} in all): {where}"
        )
