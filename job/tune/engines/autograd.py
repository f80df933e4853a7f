"""How the gradients of a micro-batch come about: by autograd for any decoder, by the engine's step where it fits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from job.tune.data.micro_batch import MicroBatch
from job.tune.device.failures import told
from job.tune.device.random_state import random_state, restore_random_state
from job.tune.engines.engine import Plan
from job.tune.engines.layers import variants_compiled
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.padding import grain_of, padded_size
from job.tune.model.adapter import trainable

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiling:
    """How layers are compiled, and who is told when they no longer are."""

    backend: str
    on_stopped: Callable[[str], None]


class AutogradPath:
    """transformers' own modules under autograd, with the engine's ops in them; compiled from the first plan on."""

    def __init__(
        self, model: PackedModel, backward: Callable[[Tensor], Any], *, compiling: Compiling | None = None
    ) -> None:
        self._model = model
        self._backward = backward
        self._compiling = compiling
        self._grain = 1
        self._proved = 0
        """Variants of compiled code, whose way back was compiled as well."""

    def accumulate(self, batch: MicroBatch, *, targets: int) -> Tensor:
        """See `Path`."""
        losses = self._by_compiled_code(batch, targets) if self._model.layers.compiled else None
        if losses is None:
            total, losses = self._model.summed_loss(batch, share=1 / targets)
            self._backward(total)
        return losses

    def _by_compiled_code(self, batch: MicroBatch, targets: int) -> Tensor | None:
        """None where compiling failed: from now on layers run as they are, and nothing was added."""
        generators = random_state()
        before: _Gradients | None = []
        try:
            size = padded_size(batch.tokens, self._grain)
            total, losses = self._model.summed_loss(batch, share=1 / targets, padded_to=size)
            # What was compiled just now compiles its way back on the way back, where a failure leaves half a gradient.
            before = _gradients(self._model) if variants_compiled() > self._proved else None
            self._backward(total)
            self._proved = variants_compiled()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if before is None or self._compiling is None:
                raise
            restore_random_state(generators)
            _restore(before)
            self._model.layers.stop_compiling()
            self._compiling.on_stopped(told(error))
            self._compiling = None
            return None
        return losses

    def refresh(self) -> None:
        """Nothing is kept of the adapter."""

    def adopt(self, plan: Plan) -> None:
        """See `Path`."""
        self._model.layers.recomputing = plan["checkpointing"]
        self._model.linears.keep_decoded(wanted=plan["kept_layers"] > 0)
        self._grain = grain_of(plan["micro_batch_tokens"])
        if self._compiling is not None and plan.get("compiled", True) and not self._model.layers.compiled:
            self._model.layers.compile(self._compiling.backend)

    def give_up_weights(self) -> Plan | None:
        """See `Path`."""
        if not self._model.linears.keeps_decoded:
            return None
        self._model.linears.keep_decoded(wanted=False)
        return {"kept_layers": 0}

    def compute_again(self) -> Plan | None:
        """See `Path`."""
        if self._model.layers.recomputing:
            return None
        self._model.layers.recomputing = True
        return {"checkpointing": True}


_Gradients = list[tuple[nn.Parameter, Tensor | None]]


def _gradients(model: PackedModel) -> _Gradients:
    """A copy."""
    return [(each, None if each.grad is None else each.grad.clone()) for each in trainable(model)]


def _restore(gradients: _Gradients) -> None:
    """In place: they may be views."""
    for parameter, gradient in gradients:
        if gradient is None or parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.copy_(gradient)
