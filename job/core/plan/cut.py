"""How a batch is cut into micro-batches on one device: the plan for the free memory, and what follows when it runs out.

The cut is the hardware's and never changes the sum: it may be another one on another GPU, or after an out-of-memory.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from job.core.data.packing import Rows
from job.core.plan.memory import (
    GIB,
    AdapterShape,
    ComputeDtype,
    DeviceMemory,
    EngineName,
    MemoryParts,
    ModelShape,
    memory_parts,
)
from job.core.plan.shares import Shares

_CPU_MICRO_BATCH_TOKENS: dict[ComputeDtype, int] = {"bf16": 4096, "fp32": 2048}
"""Activations in fp32 are twice as large: half as many take the same memory."""
_MOST_MICRO_BATCH_TOKENS = 24576
"""Beyond this the device is no faster: 20.9 k tokens per second at 24,576, 20.8 k at 32,768 (H200, 7B)."""
_FORWARD_ONLY, _MOST_EVALUATION_TOKENS = 4, 16384
"""This many times a step's tokens fit into a forward pass, even where a step recomputes; more are no faster."""
_STEADY_TOKENS = 1024
"""Micro-batches are a multiple of this: what is free differs a little from start to start, the plan should not."""
_HEADROOM: dict[EngineName, float] = {"fast": 0.93, "generic": 0.85}
"""Share of the free memory that is planned with; the allocator needs the rest."""
SHORT_TOKENS = 4096
"""With fewer tokens in a micro-batch, products are too short to be fast, and dequantising at each use costs less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What one device does at once: the same value from the plan to the checkpoint to the report."""

    engine: EngineName
    """Which engine computes the gradients."""
    micro_batch_tokens: int
    """The most of one micro-batch; a longer document has one to itself."""
    evaluation_tokens: int
    """The most of one forward pass of an evaluation: it keeps no activations, and a small one leaves a GPU idle."""
    kept_layers: int
    """Layers that keep their dequantised weights."""
    recomputed_layers: int
    """Layers that recompute their activations in the backward pass, to save memory."""
    compiled: bool
    """Whether the decoder's layers are compiled."""
    device: str
    """The kind of device, by name."""
    compute_dtype: ComputeDtype
    """What the base computes in."""
    rows: Rows = "packed"
    """How the decoder gets the documents of a micro-batch."""

    @property
    def checkpointing(self) -> bool:
        """Whether any layer recomputes its activations."""
        return self.recomputed_layers > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """A cut, and why it is this one."""

    cut: Cut
    reason: str
    predicted_peak_bytes: int | None
    """At the peak of a step; None on the CPU."""
    peak_tokens: int
    """Of the micro-batch at the peak: the largest of the steps, or what an evaluation's pass takes as much as.

    The most that the cut allows where a run has more steps than are looked at.
    """


def plan_memory(  # noqa: PLR0913 - what a plan is made of
    shape: ModelShape,
    adapter: AdapterShape,
    *,
    engine: EngineName,
    compiled: bool = True,
    rows: Rows = "packed",
    device: DeviceMemory,
    max_length: int,
    shares: Shares,
    shards: int = 1,
) -> MemoryPlan:
    """The fastest cut that fits.

    An estimate: the training loop needs less memory by itself when it runs out all the same, without changing the sum.

    Args:
        shape: of the base.
        adapter: of the adapter.
        engine: that computes the gradients.
        compiled: whether the generic engine's layers are; the fast one has none that could be.
        rows: how documents stand in a micro-batch.
        device: what is free.
        max_length: tokens of the longest example, which is never cut.
        shares: of the steps; where several ranks make them, micro-batches are no larger than these want them.
        shards: GPUs that the base is spread over; 1: it is whole.
    """
    compiled = compiled and engine == "generic"

    def planned(
        tokens: int, kept: int, recomputed: int, *, reason: str, peak: int | None, peak_tokens: int, forward: int
    ) -> MemoryPlan:
        cut = Cut(
            engine=engine,
            micro_batch_tokens=tokens,
            evaluation_tokens=forward,
            kept_layers=kept,
            recomputed_layers=recomputed,
            compiled=compiled,
            device=device.name,
            compute_dtype=device.compute_dtype,
            rows=rows,
        )
        return MemoryPlan(cut=cut, reason=reason, predicted_peak_bytes=peak, peak_tokens=peak_tokens)

    if device.kind == "cpu":
        tokens = max(_CPU_MICRO_BATCH_TOKENS[device.compute_dtype], max_length)
        without = ", in fp32: it has no instructions for bf16" if device.compute_dtype == "fp32" else ""
        return planned(tokens, 0, 0, reason=f"on the CPU{without}", peak=None, peak_tokens=tokens, forward=tokens)
    parts = memory_parts(shape, adapter, engine, compiled=compiled, rows=rows, shards=shards)
    sizes = list(_sizes(shape, parts, int(_HEADROOM[engine] * device.free_bytes), max_length=max_length, engine=engine))
    if not sizes:
        peak = parts.peak(layers=shape.layers, tokens=max_length, kept_layers=0, recomputed_layers=shape.layers)
        reason = "one example at a time: memory is short by estimate"
        forward = _forward_tokens(max_length)
        return planned(max_length, 0, shape.layers, reason=reason, peak=peak, peak_tokens=max_length, forward=forward)
    alone = tokens, kept, recomputed = _fastest(shape, sizes, max(shares.largest_step, max_length))
    if shares.ranks > 1:
        tokens, kept, recomputed = _fastest(shape, sizes, max(shares.most, max_length))
    # As one GPU's: an evaluation makes the same passes in any number of processes.
    forward = _forward_tokens(alone[0])
    seen = max(shares.largest_micro_batch(tokens), forward // _FORWARD_ONLY)
    at_peak = min(tokens, seen) if shares.all_seen else tokens
    peak = parts.peak(layers=shape.layers, tokens=at_peak, kept_layers=kept, recomputed_layers=recomputed)
    reason = f"{peak / GIB:.1f} GiB at the peak by estimate, {device.free_bytes / GIB:.1f} GiB free"
    return planned(tokens, kept, recomputed, reason=reason, peak=peak, peak_tokens=at_peak, forward=forward)


def _fastest(shape: ModelShape, sizes: Sequence["_Size"], step_tokens: int) -> "_Size":
    return min(sizes, key=lambda size: (_cost(shape.layers, size, step_tokens), size))


def _forward_tokens(tokens: int) -> int:
    """Of an evaluation's pass, where a step's micro-batch has so many."""
    return max(tokens, min(_FORWARD_ONLY * tokens, _MOST_EVALUATION_TOKENS))


def least_bytes(shape: ModelShape, adapter: AdapterShape, *, engine: EngineName, max_length: int, shards: int) -> int:
    """What a GPU must have free for one example at a time, by estimate and with the headroom that plans have."""
    parts = memory_parts(shape, adapter, engine, shards=shards)
    least = parts.peak(layers=shape.layers, tokens=max_length, kept_layers=0, recomputed_layers=shape.layers)
    return math.ceil(least / _HEADROOM[engine])


_Size = tuple[int, int, int]
"""Tokens of a micro-batch, layers that keep their dequantised weights, layers that recompute their activations."""


def _sizes(shape: ModelShape, parts: MemoryParts, free: int, *, max_length: int, engine: EngineName) -> Iterator[_Size]:
    """For each size of a micro-batch what fits and computes the least twice."""
    steady = [*range(_STEADY_TOKENS, _MOST_MICRO_BATCH_TOKENS + 1, _STEADY_TOKENS), max_length]
    for tokens in sorted(size for size in steady if size >= max_length):

        def fits(kept: int, recomputed: int, tokens: int = tokens) -> bool:
            peak = parts.peak(layers=shape.layers, tokens=tokens, kept_layers=kept, recomputed_layers=recomputed)
            return peak <= free

        # The generic engine recomputes all layers or none, and keeps the weights of all or of none: each kind of layer
        # would be compiled by itself.
        steps = 1 if engine == "fast" else shape.layers
        recomputed = next((number for number in range(0, shape.layers + 1, steps) if fits(0, number)), None)
        if recomputed is not None:
            most_kept = shape.layers if parts.dequantised_layer else 0
            kept = next((number for number in range(most_kept, 0, -steps) if fits(number, recomputed)), 0)
            yield tokens, kept, recomputed


_BUSY_TOKENS, _DEQUANTISE_TOKENS, _RECOMPUTE = 145, 277, 0.34
"""What a micro-batch and dequantising the weights cost, in tokens; and recomputing, as a share of a token.

Fitted to what an H200 did with Llama-2-7B at 2k to 24k tokens, weights kept or not.
"""


def cost_of(shape: ModelShape, cut: Cut, *, step_tokens: int) -> float:
    """Time of a token of an average step, in those of an endless micro-batch."""
    return _cost(shape.layers, (cut.micro_batch_tokens, cut.kept_layers, cut.recomputed_layers), step_tokens)


def _cost(layers: int, size: _Size, step_tokens: int) -> float:
    tokens, kept, recomputed = size
    even = step_tokens / math.ceil(step_tokens / tokens)
    dequantising = _DEQUANTISE_TOKENS * (1 - kept / layers) * (1 + recomputed / layers / 2)
    return 1 + _RECOMPUTE * recomputed / layers + (_BUSY_TOKENS + dequantising) / even


# --- memory ran out --------------------------------------------------------------------------------------------------


def after_out_of_memory(cut: Cut, *, during: Literal["step", "evaluation"], longest: int, layers: int) -> Cut | None:
    """The next smaller cut, what costs least first.

    Halve what is done at once, down to where products get short; keep no dequantised weights; halve on, down to one
    example; recompute all activations.

    Args:
        cut: that did not fit.
        during: what ran out.
        longest: tokens of the longest example of what ran out: it is never cut.
        layers: of the decoder.

    Returns:
        None: nothing is left to give up.
    """
    tokens = cut.micro_batch_tokens if during == "step" else cut.evaluation_tokens
    if tokens > max(longest, SHORT_TOKENS):
        return _with_tokens(cut, during, max(longest, SHORT_TOKENS, tokens // 2))
    if cut.kept_layers:
        return replace(cut, kept_layers=0)
    if tokens > longest:
        return _with_tokens(cut, during, max(longest, tokens // 2))
    if cut.recomputed_layers < layers:
        return replace(cut, recomputed_layers=layers)
    return None


def common_cut(cuts: Sequence[Cut]) -> Cut:
    """What fits on every device among those that train together: of each part the smallest; the rest is the first's."""
    return replace(
        cuts[0],
        micro_batch_tokens=min(cut.micro_batch_tokens for cut in cuts),
        evaluation_tokens=min(cut.evaluation_tokens for cut in cuts),
        kept_layers=min(cut.kept_layers for cut in cuts),
        recomputed_layers=max(cut.recomputed_layers for cut in cuts),
        compiled=all(cut.compiled for cut in cuts),
    )


def _with_tokens(cut: Cut, during: Literal["step", "evaluation"], tokens: int) -> Cut:
    return replace(cut, micro_batch_tokens=tokens) if during == "step" else replace(cut, evaluation_tokens=tokens)


def is_same_arithmetic(before: Cut, now: Cut) -> bool:
    """Whether both give the same numbers to the bit where micro-batches are alike.

    That is a matter of the device, of what it computes in, of the engine, of how documents stand in rows, and of
    compiled code. What is no longer compiled stays so.
    """
    same = (before.device, before.compute_dtype, before.engine) == (now.device, now.compute_dtype, now.engine)
    return same and before.rows == now.rows and before.compiled <= now.compiled


def described(cut: Cut) -> str:
    """What makes its numbers equal to the bit, in words."""
    how = " on the fast engine" if cut.engine == "fast" else " with compiled layers" if cut.compiled else ""
    return f"{cut.device} in {cut.compute_dtype}{how}{_ROWS_IN_WORDS[cut.rows]}"


_ROWS_IN_WORDS: dict[Rows, str] = {
    "packed": "",
    "padded": ", one document a row, padded",
    "alone": ", one document at a time",
}
