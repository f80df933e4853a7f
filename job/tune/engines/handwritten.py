"""TODO job.tune.engines.handwritten."""

from collections.abc import Callable

import torch
from torch import Tensor

from job.kernels.attention import Documents
from job.kernels.cuda_graphs import Replay, most_tokens
from job.kernels.llama_step import Row, Step, Thrift
from job.kernels.ops import Ops
from job.tune.data.micro_batch import MicroBatch
from job.tune.engines.autograd import log
from job.tune.engines.engine import Plan
from job.tune.engines.families import decoder_of
from job.tune.engines.packed_model import PackedModel
from job.tune.model.adapter import trainable


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
