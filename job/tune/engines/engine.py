"""What computes the gradients of a micro-batch: the training loop knows no more of an engine than this."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any, Literal, Protocol

import structlog
import torch
from torch import Tensor

from job.core.errors import CannotFitError
from job.core.plan.cut import Cut, after_out_of_memory
from job.tune.data.micro_batch import MicroBatch

log = structlog.get_logger(__name__)

OnFinished = Callable[[Iterable[Tensor], Any], None]
"""Parameters whose gradients are complete for this micro-batch, and the CUDA event after which they are (None: as soon
as what was launched on the current stream has run)."""


class Engine(Protocol):
    """Autograd for any decoder, or the hand-written step for the families that it knows."""

    @property
    def compiler_failure(self) -> str | None:
        """Why layers that were compiled no longer are; None: nothing has failed."""
        ...

    @property
    def recompilations(self) -> tuple[str, ...]:
        """Why code was compiled after `compile_ahead`, once for each time."""
        ...

    def compile_ahead(self, batch: MicroBatch) -> None:
        """Compile what any micro-batch runs, so that no step waits for it; the gradients have to be cleared.

        Args:
            batch: a micro-batch, on the device.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        ...

    def accumulate(self, batch: MicroBatch, *, targets: int, seed: int) -> Tensor:
        """Add the gradients of (sum of the losses) / targets to the adapter's.

        Args:
            batch: a micro-batch, on the device.
            targets: of the whole step.
            seed: of the micro-batch's dropout masks, at least 0 and below 2**31.

        Returns:
            Loss of each target, in nats: [N] fp32, detached.
        """
        ...

    def watch(self, on_finished: OnFinished) -> None:
        """From here on say, while a micro-batch runs, whose gradients are complete: a hint, which may be left out."""
        ...

    def refresh(self) -> None:
        """Take over the adapter's new values: after each update, and after a checkpoint was loaded."""
        ...

    def adopt(self, cut: Cut) -> None:
        """Keep weights, recompute and compile as this cut says.

        Raises:
            torch.OutOfMemoryError: the weights that it keeps do not fit.
        """
        ...


def adopt_or_shrink(engine: Engine, cut: Cut) -> Cut:
    """Let an engine adopt a cut or, where it no longer fits, the same without dequantised weights kept.

    Returns:
        The cut that it adopted.

    Raises:
        torch.OutOfMemoryError: it does not fit without them either.
    """
    try:
        engine.adopt(cut)
    except torch.OutOfMemoryError:
        if not cut.kept_layers:
            raise
    else:
        return cut
    torch.cuda.empty_cache()
    smaller = replace(cut, kept_layers=0)
    log.warning("out_of_memory", during="adopting the cut", then=asdict(smaller))
    engine.adopt(smaller)
    return smaller


def shrink(
    engine: Engine,
    cut: Cut,
    during: Literal["step", "evaluation"],
    *,
    longest: int,
    layers: int,
    error: torch.OutOfMemoryError,
) -> Cut:
    """The next smaller cut, adopted by the engine: see `after_out_of_memory`.

    Raises:
        CannotFitError: nothing is left to give up.
    """
    torch.cuda.empty_cache()
    smaller = after_out_of_memory(cut, during=during, longest=longest, layers=layers)
    if smaller is None:
        raise CannotFitError(
            f"one example of {longest} tokens does not fit this GPU, even with activations recomputed; lower "
            "data.max_length, or use a GPU with more memory"
        ) from error
    log.warning("out_of_memory", during=during, then=asdict(smaller))
    return adopt_or_shrink(engine, smaller)
