"""What a run will need and take on a kind of GPU, before one is at hand."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from job.core.course import Course
from job.core.cut import Cut, MemoryPlan, cost_of, plan_memory
from job.core.gpus import Gpu, Speed
from job.core.lengths import Lengths
from job.core.memory import GIB, AdapterShape, DeviceMemory, EngineName, MemoryParts, ModelShape, memory_parts
from job.core.packing import Rows
from job.core.section import Section

_CONTEXT_GIB = 0.7
"""What CUDA and its libraries take of a GPU before a model is loaded."""
_OTHER_WORK = 0.122
"""What attention, the adapter and the head take beside the large products, as a share of theirs."""
_PASSES = {"fast": 13.8, "generic": 33.0}
"""How often what a layer makes of a token, hidden and intermediate, passes the GPU's memory outside the products.

Both from Llama-2-7B's shape, in endless micro-batches: the fast engine on an H200 (0.839 of what the products sustain)
and on an H100 (0.814), the generic one on an H100 (0.73).
"""
_HOST_SECONDS = {"fast": 160e-6, "generic": 370e-6}
"""What an example takes of the host, which a small model waits for: of 256 in a step, two layers 64 wide, H100."""
FORWARD_SHARE = 1 / 3
"""What evaluating as many tokens takes of a step's time: there is no backward."""
_START_SECONDS, _BASE_BYTES_PER_SECOND = 55.0, 1.5e9
"""Libraries, the GPU's check, self-tests and the first step; and the base from the local disk, into 4 bits."""
_HOST_GIB = 8.0
"""Python, torch, CUDA's host side, the encoded data's pages."""
_LARGEST_SHARD_GIB = 9.4
"""transformers writes shards of at most this; one at a time is in the host's memory."""
_SPARE_DISK_GIB = 5.0
_ROUND_GIB = 4
_BF16_BYTES = 2
_GPU_HEADROOM = 0.85


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be done, whatever does it."""

    shape: ModelShape
    adapter: AdapterShape
    engine: EngineName
    compiled: bool
    """Whether the generic engine's layers will be compiled, as far as the base's config shows."""
    rows: Rows = "packed"
    """How documents will stand in a micro-batch, as far as that shows."""
    course: Course
    lengths: Lengths
    """The training examples', as they are trained on."""
    targets: int
    """Tokens the loss is over, in all training examples."""
    validation_tokens: int
    evaluations: int
    max_length: int
    kept_checkpoints: int
    """That may wait for their upload at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One kind of GPU."""

    gpu: Gpu
    parts: MemoryParts
    memory: MemoryPlan
    """How a batch would be cut, and the peak."""
    fits: bool
    """By estimate; the job tries one example at a time before it gives up."""
    tokens_per_second: float | None
    """Real ones, in training."""
    start_seconds: float
    """Until the first step is done, with the base on the local disk."""
    training_seconds: float | None
    """All steps and evaluations."""

    @property
    def seconds(self) -> float | None:
        """From start to report."""
        return None if self.training_seconds is None else self.start_seconds + self.training_seconds

    def usd(self, per_hour: float | None) -> float | None:
        """Cost of the run; None: the price or the time is not known."""
        return None if per_hour is None or self.seconds is None else per_hour * self.seconds / 3600


class Ask(Section):
    """What to ask a scheduler for."""

    gpu_memory_gib: int
    """The least that trains: one example at a time, all activations recomputed."""
    host_memory_gib: int
    """Room for Python, torch, and the base's largest shard on its way to the GPU."""
    disk_gib: int
    """Room for the base and the work folder."""


def forecast(work: Workload, gpu: Gpu) -> Forecast:
    """How a batch would be cut, and how long the run would take."""
    free = int((gpu.memory_gib - _CONTEXT_GIB) * GIB)
    step_tokens = work.course.largest_step(work.lengths)
    memory = plan_memory(
        work.shape,
        work.adapter,
        engine=work.engine,
        compiled=work.compiled,
        rows=work.rows,
        device=DeviceMemory(kind="cuda", name=gpu.name, free_bytes=free),
        max_length=work.max_length,
        step_tokens=step_tokens,
    )
    speed = None if gpu.speed is None else _tokens_per_second(work, memory.cut, gpu.speed)
    return Forecast(
        gpu=gpu,
        parts=_parts(work),
        memory=memory,
        fits=memory.predicted_peak_bytes is not None and memory.predicted_peak_bytes < free,
        tokens_per_second=speed,
        start_seconds=_START_SECONDS + 2 * work.shape.parameters / _BASE_BYTES_PER_SECOND,
        training_seconds=None if speed is None else _busy_tokens(work) / speed,
    )


def _tokens_per_second(work: Workload, cut: Cut, speed: Speed) -> float:
    """Real ones: as fast as the products, the memory and the host let a token of an average step be."""
    shape, mean_length = work.shape, work.course.mean_length(work.lengths)
    mean_step = max(1, round(mean_length * work.course.total / work.course.steps))
    products = (1 + _OTHER_WORK) * flops_per_token(work) / speed.sustained_flops
    moved = _PASSES[work.engine] * shape.layers * _BF16_BYTES * (shape.hidden + shape.intermediate)
    if shape.recurrent is not None:
        lengths = work.lengths.astype(np.float64)
        by_length = shape.recurrent.moved_by_length * float((lengths**2).sum() / lengths.sum())
        moved += shape.recurrent.layers * (shape.recurrent.moved + by_length)
    on_the_gpu = (products + moved / speed.bytes_per_second) * cost_of(shape, cut, step_tokens=mean_step)
    return 1 / max(on_the_gpu, _HOST_SECONDS[work.engine] / mean_length)


def _parts(work: Workload) -> MemoryParts:
    return memory_parts(work.shape, work.adapter, work.engine, compiled=work.compiled, rows=work.rows)


def trained_tokens(work: Workload) -> int:
    """Real tokens of all steps."""
    return round(work.course.mean_length(work.lengths) * work.course.total)


def _busy_tokens(work: Workload) -> float:
    """Tokens of all steps, and those of the evaluations by what they cost."""
    return trained_tokens(work) + FORWARD_SHARE * work.validation_tokens * work.evaluations


def flops_per_token(work: Workload) -> float:
    """Floating-point operations of a step, a real token.

    The base: 2 forward and 2 for the gradient of the input, a weight; no gradient of the weight itself. The adapter: 6.
    Of experts those count that a token goes through.
    Attention: 12 layers width a pair of tokens that see each other (Kaplan et al. 2020, arXiv 2001.08361, section 2.1,
    and one and a half times as much for the backward). The head: target tokens only.
    """
    shape, lengths = work.shape, work.lengths.astype(np.float64)
    tokens = float(lengths.sum())
    head = 4 * shape.vocabulary * shape.hidden * work.targets / tokens
    pairs = float((lengths * (lengths + 1) / 2).sum()) / tokens
    attention = 12 * shape.layers * shape.heads * shape.head_width * pairs
    return 4 * shape.active_parameters + head + 6 * work.adapter.active_parameters(shape) + attention


def ask_for(work: Workload) -> Ask:
    """Host memory and disk: the base is on the disk in bf16 and once more in 4 bits, and passes the host's memory."""
    base = 2 * work.shape.parameters / GIB
    checkpoint = 8 * work.adapter.parameters / GIB
    layers, parts = work.shape.layers, _parts(work)
    packed = (parts.weights + parts.embeddings) / GIB
    least = parts.peak(layers=layers, tokens=work.max_length, kept_layers=0, recomputed_layers=layers)
    return Ask(
        gpu_memory_gib=math.ceil(least / GIB / _GPU_HEADROOM + _CONTEXT_GIB),
        host_memory_gib=_rounded(_HOST_GIB + min(base, _LARGEST_SHARD_GIB) + 4 * work.adapter.parameters / GIB),
        disk_gib=_rounded(_SPARE_DISK_GIB + base + packed + (work.kept_checkpoints + 1) * checkpoint),
    )


def _rounded(gib: float) -> int:
    return math.ceil(gib / _ROUND_GIB) * _ROUND_GIB


class Candidate(Section):
    """A max_length and what it cuts."""

    tokens: int
    """The max_length."""
    examples_over: int
    """Training examples that are longer."""
    share_cut: float
    """Share of all tokens that lie beyond it."""


def candidates(lengths: Lengths, *, chosen: int, positions: int) -> Sequence[Candidate]:
    """What each max_length would cut: powers of two up to the longest example, and the chosen one."""
    longest = int(lengths.max())
    limits = {2**power for power in range(7, 24) if 2**power < 2 * longest and 2**power <= positions} | {chosen}
    total = int(lengths.sum())
    return [
        Candidate(
            tokens=limit,
            examples_over=int((lengths > limit).sum()),
            share_cut=int(np.maximum(lengths - limit, 0).sum()) / total,
        )
        for limit in sorted(limits)
    ]
