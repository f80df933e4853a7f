"""How the gradients of a micro-batch come about: by autograd for any decoder, by the engine's step where it fits."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from job.engine.attention import Documents
from job.engine.llama import Row, Step, Thrift
from job.engine.ops import Ops
from job.tune.encode import MicroBatch
from job.tune.fast import decoder_of
from job.tune.model import PackedModel

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
        """Compute again what this plan computes again."""
        ...

    def save_memory(self) -> Plan | None:
        """Need less memory from now on; what changes in the plan, or None where nothing more can be saved."""
        ...


class AutogradPath:
    """transformers' and PEFT's own modules."""

    def __init__(self, model: PackedModel, backward: Callable[[Tensor], Any]) -> None:
        self._model = model
        self._backward = backward
        self._checkpointing = False

    def accumulate(self, batch: MicroBatch, *, targets: int) -> Tensor:
        """See `Path`."""
        total, losses = self._model.summed_loss(batch, share=1 / targets)
        self._backward(total)
        return losses

    def refresh(self) -> None:
        """Nothing is kept of the adapter."""

    def adopt(self, plan: Plan) -> None:
        """See `Path`."""
        if plan["checkpointing"] and not self._checkpointing:
            self._checkpointing = True
            self._model.layers.recomputing = True

    def save_memory(self) -> Plan | None:
        """See `Path`."""
        if self._checkpointing:
            return None
        self.adopt({"checkpointing": True})
        return {"checkpointing": True}


class FastPath:
    """The engine's hand-written step."""

    def __init__(self, model: PackedModel, ops: Ops, *, dtype: torch.dtype, thrift: Thrift) -> None:
        self._model = model
        self._decoder = decoder_of(model.model, decode=ops.decode)
        self._thrift = thrift
        self._dropout = max(group.dropout for layer in self._decoder.layers for group in layer.groups)
        self._make: Callable[[Thrift], Step] = lambda thrift: Step(self._decoder, ops, dtype=dtype, thrift=thrift)
        self._step: Step | None = self._make(thrift)

    def accumulate(self, batch: MicroBatch, *, targets: int) -> Tensor:
        """See `Path`."""
        assert self._step is not None
        seed = None
        if self._model.training and self._dropout:
            seed = int(torch.randint(2**31, ()))  # on the host, from the generator that a checkpoint holds
        return self._step.accumulate(_row(batch), share=1 / targets, seed=seed)

    def refresh(self) -> None:
        """See `Path`."""
        assert self._step is not None
        self._step.refresh()

    def adopt(self, plan: Plan) -> None:
        """See `Path`."""
        self._rebuild(Thrift(kept_layers=plan["kept_layers"], recomputed_layers=plan["recomputed_layers"]))

    def save_memory(self) -> Plan | None:
        """See `Path`: decoded weights go first, which costs least."""
        layers = len(self._decoder.layers)
        if self._thrift.kept_layers:
            change = {"kept_layers": 0}
        elif self._thrift.recomputed_layers < layers:
            change = {"recomputed_layers": layers, "checkpointing": True}
        else:
            return None
        self.adopt(
            {"kept_layers": 0, "recomputed_layers": change.get("recomputed_layers", self._thrift.recomputed_layers)}
        )
        return change

    def _rebuild(self, thrift: Thrift) -> None:
        if thrift == self._thrift:
            return
        self._step = None  # its matrices first, then the new ones
        self._thrift, self._step = thrift, self._make(thrift)


def _row(batch: MicroBatch) -> Row:
    return Row(
        ids=batch.input_ids[0],
        positions=batch.position_ids[0],
        documents=Documents(bounds=batch.bounds, lengths=batch.document_lengths),
        places=batch.target_places,
        targets=batch.target_ids,
    )
