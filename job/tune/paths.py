"""How the gradients of a micro-batch come about: by autograd for any decoder, by the engine's step where it fits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
import torch
from torch import Tensor, nn

from job.engine.attention import Documents
from job.engine.llama import Row, Step, Thrift
from job.engine.ops import Ops
from job.engine.replay import Replay, most_tokens
from job.tune.device import random_state, restore_random_state, told
from job.tune.encode import MicroBatch
from job.tune.fast import decoder_of
from job.tune.layers import variants_compiled
from job.tune.model import PackedModel, trainable
from job.tune.padding import grain_of, padded_size

log = structlog.get_logger(__name__)

Plan = dict[str, Any]
"""How a batch is cut for this device, as a checkpoint keeps it."""


class Path(Protocol):
    """The training loop knows no more of it than this."""

    def accumulate(self, batch: MicroBatch, *, targets: int) -> Tensor:
        """Add the gradients of (sum of the losses) / targets to the adapter's.

        Args:
            batch: a micro-batch, on the device.
            targets: of the whole step.

        Returns:
            Loss of each target, in nats: [N] fp32, detached.
        """
        ...

    def refresh(self) -> None:
        """The adapter changed: after each update, and after a checkpoint was loaded."""
        ...

    def adopt(self, plan: Plan) -> None:
        """Cut micro-batches, compute again, and compile, as this plan does; one of an older image does not say all."""
        ...

    def give_up_weights(self) -> Plan | None:
        """Keep no decoded weights from now on, which costs little; what changes in the plan, None where none are."""
        ...

    def compute_again(self) -> Plan | None:
        """Keep no activations from now on, which costs most; what changes in the plan, None where none are."""
        ...


def settle(path: Path, plan: Plan) -> bool:
    """Let a path adopt a plan; when memory has gone since that was made, without decoded weights.

    Returns:
        Whether all of it fitted; if not, the plan has changed.

    Raises:
        torch.OutOfMemoryError: nor does it fit without them.
    """
    try:
        path.adopt(plan)
    except torch.OutOfMemoryError:
        if not plan["kept_layers"]:
            raise
    else:
        return True
    torch.cuda.empty_cache()
    plan["kept_layers"] = 0
    path.adopt(plan)
    return False


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


class FastPath:
    """The engine's hand-written step."""

    def __init__(self, model: PackedModel, ops: Ops, *, dtype: torch.dtype, thrift: Thrift) -> None:
        self._model = model
        self._decoder = decoder_of(model.model, decode=ops.decode)
        self._thrift = thrift
        self._dropout = max(group.dropout for layer in self._decoder.layers for group in layer.groups)
        own = model.attention.own
        self._make: Callable[[Thrift], Step] = lambda thrift: Step(
            self._decoder, ops, dtype=dtype, thrift=thrift, own_attention=own
        )
        self._step: Step | Replay | None = self._make(thrift)

    def accumulate(self, batch: MicroBatch, *, targets: int) -> Tensor:
        """See `Path`."""
        assert self._step is not None
        seed = None
        if self._model.training and self._dropout:
            seed = int(torch.randint(2**31, ()))  # on the host, from the generator that a checkpoint holds
        return self._step.accumulate(_row(batch, targets=targets, seed=seed))

    def refresh(self) -> None:
        """See `Path`."""
        assert self._step is not None
        self._step.refresh()

    def adopt(self, plan: Plan) -> None:
        """See `Path`."""
        self._step = None  # its matrices first, then the new ones
        self._thrift = Thrift(kept_layers=plan["kept_layers"], recomputed_layers=plan["recomputed_layers"])
        step = self._step = self._make(self._thrift)
        if step.device.type == "cuda":
            self._step = Replay(
                step,
                trainable(self._model),
                most_tokens=most_tokens(step),
                on_failure=lambda reason: log.warning("no_cuda_graphs", reason=reason, then="small batches are slower"),
            )

    def give_up_weights(self) -> Plan | None:
        """See `Path`."""
        return self._adopted({"kept_layers": 0}) if self._thrift.kept_layers else None

    def compute_again(self) -> Plan | None:
        """See `Path`."""
        layers = len(self._decoder.layers)
        if self._thrift.recomputed_layers == layers:
            return None
        return self._adopted({"recomputed_layers": layers, "checkpointing": True})

    def _adopted(self, change: Plan) -> Plan:
        self.adopt(
            {"kept_layers": self._thrift.kept_layers, "recomputed_layers": self._thrift.recomputed_layers} | change
        )
        return change


def _row(batch: MicroBatch, *, targets: int, seed: int | None) -> Row:
    device = batch.input_ids.device
    return Row(
        ids=batch.input_ids[0],
        positions=batch.position_ids[0],
        documents=Documents(bounds=batch.bounds, lengths=batch.document_lengths),
        places=batch.target_places,
        targets=batch.target_ids,
        share=torch.full((1,), 1 / targets, device=device),
        seed=None if seed is None else torch.full((1,), seed, dtype=torch.int64, device=device),
    )
