"""The fast engine: the hand-written step, for the families that it knows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import structlog
import torch
from torch import Tensor

from job.core.plan.cut import Cut
from job.kernels.attention import Segments
from job.kernels.cuda_graphs import Replay, most_recorded, most_tokens
from job.kernels.decoder import HERE, PackedRow, Saving
from job.kernels.llama_step import Step
from job.kernels.ops import Ops
from job.kernels.weights import Group
from job.tune.data.micro_batch import MicroBatch
from job.tune.device.device import device_memory, release_memory
from job.tune.engines.engine import OnFinished
from job.tune.engines.families import decoder_of
from job.tune.engines.packed_model import PackedModel
from job.tune.model.adapter import trainable

log = structlog.get_logger(__name__)

_MakeStep = Callable[[Saving], Step]


class HandwrittenEngine:
    """See `Engine`. Small micro-batches are replayed as CUDA graphs on a GPU, once a cut is adopted."""

    compiler_failure: str | None = None
    recompilations: tuple[str, ...] = ()

    def __init__(self, model: PackedModel, ops: Ops, *, dtype: torch.dtype, saving: Saving) -> None:
        """Take the tensors out of the model's modules.

        Args:
            model: base and adapter, on the device; `families.reason_against` has found nothing.
            ops: those of this device, from `ops_of`.
            dtype: to compute in.
            saving: what layers keep and recompute until a cut is adopted.
        """
        self._model = model
        self._decoder = decoder_of(model.model, dequantise=ops.dequantise, arrivals=model.sharded or HERE)
        self._dropout = max(group.dropout for layer in self._decoder.layers for group in layer.groups)
        own = model.attention.own
        self._make: _MakeStep = lambda saving: Step(self._decoder, ops, dtype=dtype, saving=saving, own_attention=own)
        self._step: Step | Replay | None = self._make(saving)
        self._on_finished: OnFinished | None = None

    def compile_ahead(self, batch: MicroBatch) -> None:
        """Nothing to do: its kernels are compiled when they are compared, before this engine is chosen."""

    def accumulate(self, batch: MicroBatch, *, targets: int, seed: int) -> Tensor:
        """See `Engine`."""
        assert self._step is not None
        masked = self._model.training and self._dropout
        return self._step.accumulate(_row(batch, targets=targets, seed=seed if masked else None))

    def watch(self, on_finished: OnFinished) -> None:
        """See `Engine`."""
        self._on_finished = on_finished
        self._watch()

    def _watch(self) -> None:
        on_finished = self._on_finished
        if on_finished is None:
            return
        groups = [*(layer.groups for layer in self._decoder.layers), (self._decoder.head,)]
        trained = [_trained(each) for each in groups]

        def say(index: int, after: Any) -> None:
            on_finished(trained[index], after)

        if isinstance(self._step, Replay):
            self._step.watch(say)
        elif self._step is not None:
            self._step.on_finished = partial(say, after=None)

    def refresh(self) -> None:
        """See `Engine`."""
        assert self._step is not None
        self._step.refresh()

    def adopt(self, cut: Cut) -> None:
        """See `Engine`."""
        self._step = None  # its matrices are freed before the new ones are made
        kept = cut.kept_layers if self._model.sharded is None else 0  # of what is not there nothing can be kept
        step = self._step = self._make(Saving(kept_layers=kept, recomputed_layers=cut.recomputed_layers))
        if step.device.type == "cuda":
            release_memory(step.device)
            free = device_memory(step.device).free_bytes
            padded = most_tokens(step)
            recorded = most_recorded(step, micro_batch_tokens=cut.micro_batch_tokens, free_bytes=free)
            if self._model.sharded is None and recorded < min(padded, cut.micro_batch_tokens):
                then = "those beyond are launched, which is slower where they are small"
                log.info("recordings_limited", tokens=recorded, free_bytes=free, then=then)
            self._step = Replay(
                step,
                trainable(self._model),
                most_tokens=padded,
                most_recorded=recorded,
                records=self._model.sharded is None,
                on_failure=lambda reason: log.warning("no_cuda_graphs", reason=reason, then="small batches are slower"),
            )
        self._watch()


def _trained(groups: Sequence[Group]) -> list[Tensor]:
    adapters = [layer.adapter for group in groups for layer in group.layers if layer.adapter is not None]
    return [factor for adapter in adapters for factor in (adapter.a, adapter.b)]


def _row(batch: MicroBatch, *, targets: int, seed: int | None) -> PackedRow:
    device = batch.input_ids.device
    return PackedRow(
        ids=batch.input_ids[0],
        positions=batch.position_ids[0],
        segments=Segments(cu_seqlens=batch.cu_seqlens, lengths=batch.document_lengths),
        places=batch.target_places,
        targets=batch.target_ids,
        weight_per_target=torch.full((1,), 1 / targets, device=device),
        seed=None if seed is None else torch.full((1,), seed, dtype=torch.int64, device=device),
    )
