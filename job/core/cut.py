"""TODO job.core.cut."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from job.core.memory import _GIB, AdapterShape, DeviceMemory, MemoryParts, ModelShape, PathName, memory_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How a batch is cut for this device."""

    path: PathName
    micro_batch_tokens: int
    """At most."""
    kept_layers: int
    """So many layers keep their decoded weights."""
    recomputed_layers: int
    """So many layers compute their activations again in the backward pass, to save memory."""
    compiled: bool
    """Whether the layers are compiled."""
    reason: str
    predicted_peak_bytes: int | None
    """Of a step; None on the CPU."""

    @property
    def checkpointing(self) -> bool:
        """Whether any layer computes its activations again."""
        return self.recomputed_layers > 0

    @property
    def evaluation_tokens(self) -> int:
        """Of a pass without a way back, at most: it keeps no layer's activations, and a small one leaves a GPU idle."""
        if self.predicted_peak_bytes is None:
            return self.micro_batch_tokens
        return max(self.micro_batch_tokens, min(_FORWARD_ONLY * self.micro_batch_tokens, _MOST_EVALUATION_TOKENS))

    @property
    def cut(self) -> dict[str, int | bool]:
        """How a batch is cut, as a checkpoint keeps it."""
        return {
            "micro_batch_tokens": self.micro_batch_tokens,
            "evaluation_tokens": self.evaluation_tokens,
            "checkpointing": self.checkpointing,
            "kept_layers": self.kept_layers,
            "recomputed_layers": self.recomputed_layers,
            "compiled": self.compiled,
        }


_CPU_MICRO_BATCH_TOKENS = 4096


_MOST_MICRO_BATCH_TOKENS = 24576
"""Beyond this the device is no faster: 20.9 k tokens per second at 24,576, 20.8 k at 32,768 (H200, 7B)."""


_FORWARD_ONLY, _MOST_EVALUATION_TOKENS = 4, 16384
"""So many times a step's tokens fit without a way back, even where that goes forward again; more are no faster."""


_STEADY_TOKENS = 1024
"""Micro-batches are a multiple of this: what is free differs a little from start to start, the plan should not."""


_HEADROOM = {"fast": 0.93, "generic": 0.85}
"""Share of the free memory that is planned with; the allocator needs the rest."""


def plan_memory(
    shape: ModelShape,
    adapter: AdapterShape,
    *,
    path: PathName,
    compiled: bool = True,
    device: DeviceMemory,
    max_length: int,
    step_tokens: int,
) -> MemoryPlan:
    """The fastest cut that fits.

    An estimate: the training loop needs less memory by itself when it runs out all the same, without changing the sum.

    Args:
        shape: of the base.
        adapter: of the adapter.
        path: that computes the gradients.
        compiled: whether the generic path's layers are; the fast path has none that could be.
        device: what is free.
        max_length: tokens of the longest example, which is never cut.
        step_tokens: tokens of an average step.
    """
    compiled = compiled and path == "generic"
    if device.kind == "cpu":
        tokens = max(_CPU_MICRO_BATCH_TOKENS, max_length)
        return MemoryPlan(
            path=path,
            micro_batch_tokens=tokens,
            kept_layers=0,
            recomputed_layers=0,
            compiled=compiled,
            reason="on the CPU",
            predicted_peak_bytes=None,
        )
    parts = memory_parts(shape, adapter, path, compiled=compiled)
    free = int(_HEADROOM[path] * device.free_bytes)
    cuts = list(_cuts(shape, parts, free, max_length=max_length, path=path))
    if not cuts:
        return MemoryPlan(
            path=path,
            micro_batch_tokens=max_length,
            kept_layers=0,
            recomputed_layers=shape.layers,
            compiled=compiled,
            reason="one example at a time: memory is short by estimate",
            predicted_peak_bytes=parts.peak(
                layers=shape.layers, tokens=max_length, kept_layers=0, recomputed_layers=shape.layers
            ),
        )
    tokens, kept, again = min(cuts, key=lambda cut: (_cost(shape.layers, cut, max(step_tokens, max_length)), cut))
    peak = parts.peak(layers=shape.layers, tokens=tokens, kept_layers=kept, recomputed_layers=again)
    return MemoryPlan(
        path=path,
        micro_batch_tokens=tokens,
        kept_layers=kept,
        recomputed_layers=again,
        compiled=compiled,
        reason=f"{peak / _GIB:.1f} GiB at the peak by estimate, {device.free_bytes / _GIB:.1f} GiB free",
        predicted_peak_bytes=peak,
    )


Cut = tuple[int, int, int]
"""Tokens of a micro-batch, layers that keep their decoded weights, layers that compute their activations again."""


def _cuts(shape: ModelShape, parts: MemoryParts, free: int, *, max_length: int, path: PathName) -> Iterator[Cut]:
    """For each size of a micro-batch, the cut that fits and computes the least twice."""
    sizes = [*range(_STEADY_TOKENS, _MOST_MICRO_BATCH_TOKENS + 1, _STEADY_TOKENS), max_length]
    for tokens in sorted(size for size in sizes if size >= max_length):

        def fits(kept: int, again: int, tokens: int = tokens) -> bool:
            return parts.peak(layers=shape.layers, tokens=tokens, kept_layers=kept, recomputed_layers=again) <= free

        # The generic path computes all layers again, or none, and keeps the weights of all, or of none: each kind of
        # layer would be compiled by itself.
        steps = 1 if path == "fast" else shape.layers
        again = next((number for number in range(0, shape.layers + 1, steps) if fits(0, number)), None)
        if again is not None:
            most_kept = shape.layers if parts.decoded_layer else 0
            kept = next((number for number in range(most_kept, 0, -steps) if fits(number, again)), 0)
            yield tokens, kept, again


_BUSY_TOKENS, _DECODE_TOKENS, _AGAIN = 145, 277, 0.34
"""A micro-batch costs as much as so many more tokens; decoding the weights as so many; going forward again, a share.

Fitted to what an H200 did with Llama-2-7B at 2k to 24k tokens, weights kept or not.
"""


def cost_of(shape: ModelShape, plan: MemoryPlan, *, step_tokens: int) -> float:
    """Time of a token of an average step, in those of an endless micro-batch."""
    return _cost(shape.layers, (plan.micro_batch_tokens, plan.kept_layers, plan.recomputed_layers), step_tokens)


def _cost(layers: int, cut: Cut, step_tokens: int) -> float:
    tokens, kept, again = cut
    even = step_tokens / math.ceil(step_tokens / tokens)
    decoding = _DECODE_TOKENS * (1 - kept / layers) * (1 + again / layers / 2)
    return 1 + _AGAIN * again / layers + (_BUSY_TOKENS + decoding) / even
