"""The generic engine: any decoder under autograd, with our linear layers, attention and loss in it."""

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from job.core.errors import JobError
from job.core.plan.cut import Cut
from job.tune.data.micro_batch import MicroBatch
from job.tune.device.failures import error_line
from job.tune.engines.engine import OnFinished
from job.tune.engines.layers import reason_for_last, variants_compiled
from job.tune.engines.packed_model import PackedModel
from job.tune.model.adapter import trainable


class AutogradEngine:
    """See `Engine`. Layers are compiled once it adopts a cut that says so."""

    def __init__(self, model: PackedModel, backward: Callable[[Tensor], Any], *, compiler: str | None = None) -> None:
        """Nothing is compiled yet.

        Args:
            model: base and adapter, on the device.
            backward: autograd's, or accelerate's.
            compiler: torch.compile's backend for the decoder's layers; None: they run uncompiled.
        """
        self._model = model
        self._backward = backward
        self._compiler = compiler
        self._proved = 0
        """Variants of compiled code whose backward is compiled as well."""
        self._is_ahead = False
        self._is_compiling = False
        """Whether this backward may fail with half a gradient, and be made again."""
        self.compiler_failure: str | None = None
        self.recompilations: tuple[str, ...] = ()
        self._on_finished: OnFinished | None = None

    def watch(self, on_finished: OnFinished) -> None:
        """See `Engine`."""
        if self._on_finished is None:
            # Weakly: through a parameter's hook no collector sees that nobody else holds the model any more.
            say = WeakMethod(self._say)

            def said(parameter: nn.Parameter) -> None:
                if (still_there := say()) is not None:
                    still_there(parameter)

            for parameter in trainable(self._model):
                parameter.register_post_accumulate_grad_hook(said)  # type: ignore[no-untyped-call]
        self._on_finished = on_finished

    def _say(self, parameter: nn.Parameter) -> None:
        if self._on_finished is not None and not self._is_compiling:
            self._on_finished([parameter], None)

    def compile_ahead(self, batch: MicroBatch) -> None:
        """See `Engine`."""
        if self._model.layers.compiled:
            self.accumulate(batch, targets=batch.targets, seed=0)
            self._is_ahead = True

    def accumulate(self, batch: MicroBatch, *, targets: int, seed: int) -> Tensor:
        """See `Engine`."""
        losses = self._by_compiled_code(batch, targets, seed) if self._model.layers.compiled else None
        if losses is None:
            self._model.seed_dropout(seed)
            total, losses = self._model.summed_loss(batch, weight_per_target=1 / targets)
            self._backward(total)
        return losses

    def _by_compiled_code(self, batch: MicroBatch, targets: int, seed: int) -> Tensor | None:
        """Losses by compiled layers; None where compiling failed: nothing was added, and layers stay uncompiled."""
        before: _Gradients | None = []
        self._model.seed_dropout(seed)
        try:
            total, losses = self._model.summed_loss(batch, weight_per_target=1 / targets)
            # The backward of new code is compiled during the backward, where a failure leaves half a gradient.
            before = _gradients(self._model) if variants_compiled() > self._proved else None
            self._is_compiling = before is not None
            self._backward(total)
            if before is not None:
                more, self._proved = variants_compiled() - self._proved, variants_compiled()
                if self._is_ahead:
                    self.recompilations = (*self.recompilations, reason_for_last(more))
        except (torch.OutOfMemoryError, JobError):  # that another rank is gone is no failure of the compiler
            raise
        except Exception as error:
            if before is None:
                raise
            _restore(before)
            self._model.layers.stop_compiling()
            self._compiler, self.compiler_failure = None, error_line(error)
            return None
        finally:
            self._is_compiling = False
        return losses

    def refresh(self) -> None:
        """Nothing to do: no copy of the adapter is kept."""

    def adopt(self, cut: Cut) -> None:
        """See `Engine`."""
        self._model.layers.recomputing = cut.checkpointing
        # Of a base that is sharded nothing can be kept: most of it is not there.
        self._model.linears.keep_dequantised(wanted=cut.kept_layers > 0 and self._model.sharded is None)
        if self._compiler is not None and cut.compiled and not self._model.layers.compiled:
            self._model.layers.compile(self._compiler)


_Gradients = list[tuple[nn.Parameter, Tensor | None]]


def _gradients(model: PackedModel) -> _Gradients:
    """A copy of the adapter's gradients."""
    return [(each, None if each.grad is None else each.grad.clone()) for each in trainable(model)]


def _restore(gradients: _Gradients) -> None:
    """Put a copy back, in place: gradients may be views."""
    for parameter, gradient in gradients:
        if gradient is None or parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.copy_(gradient)
