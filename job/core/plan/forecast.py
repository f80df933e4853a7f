"""What a run will need and take on a kind of GPU, before one is at hand."""

import math
from dataclasses import dataclass

import numpy as np

from job.core.data.lengths import Lengths
from job.core.data.packing import Rows
from job.core.plan.ceiling import flops_per_token
from job.core.plan.course import Course
from job.core.plan.cut import Cut, MemoryPlan, cost_of, least_bytes, plan_memory
from job.core.plan.gpus import Gpu, Speed
from job.core.plan.memory import (
    GIB,
    AdapterShape,
    DeviceMemory,
    EngineName,
    MemoryParts,
    ModelShape,
    Placement,
    memory_parts,
    row_bytes,
)
from job.core.plan.scaling import (
    ALONE,
    Cluster,
    Dealt,
    Share,
    busiest,
    dealt_steps,
    gather_seconds,
    left_of_sum,
    sent_bytes,
    sum_seconds,
    times_one,
    waiting_for_gathers,
)
from job.core.plan.shares import shares_of
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
_UPDATE_PASSES = 40
"""How often the trained parameters, 4 bytes each, pass the GPU's memory once a step, however few tokens it has.

30 by the optimizer (2.9 ms for 81 million on an H100), 10 to clip, to keep a copy, to choose and to hand on.
"""
FORWARD_SHARE = 1 / 3
"""What evaluating as many tokens takes of a step's time: there is no backward."""
_START_SECONDS, _BASE_BYTES_PER_SECOND = 55.0, 1.5e9
"""Libraries, the GPU's check, self-tests and the first step; and the base from the local disk, into 4 bits."""
_LAUNCH_SECONDS = 15.0
"""A launcher that loads the libraries before its workers do, and a group that forms; by estimate."""
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
    against_shards: str | None = None
    """Why the base cannot be spread over several GPUs; None: it can."""
    base_bytes: int | None = None
    """Of the base's files; None: there are none yet, and they are taken to be in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """What several GPUs of a kind make of it, computed."""

    times_one: float
    """How many times as fast as one of them."""
    busiest: float
    """Tokens of the one that has the most in a step, beside an even share."""
    exchange_seconds: float
    """Of a step, on the average, in which nothing is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One kind of GPU, one of them or several."""

    gpu: Gpu
    cluster: Cluster
    placement: Placement
    parts: MemoryParts
    memory: MemoryPlan
    """How a batch would be cut, and the peak."""
    fits: bool
    """By estimate; the job tries one example at a time before it gives up."""
    scaled: Scaled | None
    """None: it is one GPU, or its speed is not known."""
    sent_bytes: int
    """That each GPU sends to the others in a step, to sum gradients."""
    tokens_per_second: float | None
    """Real ones, in training, of all GPUs together."""
    start_seconds: float
    """Until the first step is done, with the base on the local disk."""
    training_seconds: float | None
    """All steps and evaluations."""

    @property
    def seconds(self) -> float | None:
        """From start to report."""
        return None if self.training_seconds is None else self.start_seconds + self.training_seconds

    def usd(self, per_hour: float | None) -> float | None:
        """Cost of the run on all GPUs, from the price of one; None: the price or the time is not known."""
        if per_hour is None or self.seconds is None:
            return None
        return self.cluster.ranks * per_hour * self.seconds / 3600


class Ask(Section):
    """What to ask a scheduler for, on each node."""

    gpus: int
    """Of a node."""
    nodes: int
    """How many of them."""
    gpu_memory_gib: int
    """The least of each GPU that trains: one example at a time, all activations recomputed."""
    host_memory_gib: int
    """Room for Python and torch in each process, and the base's largest shard on its way to the GPU."""
    disk_gib: int
    """Room for the base and the work folder."""


def forecast(work: Workload, gpu: Gpu, cluster: Cluster = ALONE) -> Forecast:
    """How a batch would be cut, and how long the run would take.

    Several GPUs have the whole base each where it fits one of them, and else a part of each layer, if it has layers
    that can be spread.
    """
    free = int((gpu.memory_gib - _CONTEXT_GIB) * GIB)
    placement = _placement(work, free, cluster)
    shards = cluster.ranks if placement == "sharded" else 1
    device = DeviceMemory(kind="cuda", name=gpu.name, free_bytes=free)
    by_one = memory = _plan(work, device, shards, ranks=1)
    if cluster.ranks > 1:
        memory = _plan(work, device, shards, ranks=cluster.ranks)
    alone = None if gpu.speed is None else _tokens_per_second(work, by_one.cut, gpu.speed)
    scaled = _scaled(work, memory.cut, gpu, cluster, placement, alone=by_one.cut)
    speed = alone if alone is None or scaled is None else alone * scaled.times_one
    launching = _LAUNCH_SECONDS if cluster.ranks > 1 else 0.0
    evaluating = _evaluating_tokens(work, memory.cut, cluster.ranks)
    return Forecast(
        gpu=gpu,
        cluster=cluster,
        placement=placement,
        parts=_parts(work, shards),
        memory=memory,
        fits=memory.predicted_peak_bytes is not None and memory.predicted_peak_bytes < free,
        scaled=scaled,
        sent_bytes=sent_bytes(work.adapter.parameters, cluster),
        tokens_per_second=speed,
        start_seconds=_START_SECONDS + launching + 2 * work.shape.parameters / _BASE_BYTES_PER_SECOND,
        training_seconds=None if speed is None or alone is None else trained_tokens(work) / speed + evaluating / alone,
    )


def _plan(work: Workload, device: DeviceMemory, shards: int, *, ranks: int) -> MemoryPlan:
    return plan_memory(
        work.shape,
        work.adapter,
        engine=work.engine,
        compiled=work.compiled,
        rows=work.rows,
        device=device,
        max_length=work.max_length,
        shards=shards,
        shares=shares_of(work.course, work.lengths, ranks=ranks),
    )


def _placement(work: Workload, free: int, cluster: Cluster) -> Placement:
    """As a run chooses it: whole on each GPU where one example at a time fits beside it, or it cannot be spread."""
    if cluster.ranks == 1 or work.against_shards is not None:
        return "replicated"
    least = least_bytes(work.shape, work.adapter, engine=work.engine, max_length=work.max_length, shards=1)
    return "replicated" if least <= free else "sharded"


def _tokens_per_second(work: Workload, cut: Cut, speed: Speed) -> float:
    """Real ones, of one GPU: as fast as the products, the memory and the host let an average step be."""
    mean_length = work.course.mean_length(work.lengths)
    tokens = max(1, round(mean_length * work.course.total / work.course.steps))
    return tokens / _step_seconds(work, cut, speed, tokens=tokens, examples=tokens / mean_length)


def _step_seconds(work: Workload, cut: Cut, speed: Speed, *, tokens: int, examples: float) -> float:
    """What one GPU computes."""
    shape = work.shape
    flops = flops_per_token(shape, work.adapter, lengths=work.lengths, targets=work.targets)
    products = (1 + _OTHER_WORK) * flops / speed.sustained_flops
    moved = _PASSES[work.engine] * shape.layers * _BF16_BYTES * (shape.hidden + shape.intermediate)
    if shape.recurrent is not None:
        lengths = work.lengths.astype(np.float64)
        by_length = shape.recurrent.moved_by_length * float((lengths**2).sum() / lengths.sum())
        moved += shape.recurrent.layers * (shape.recurrent.moved + by_length)
    a_token = (products + moved / speed.bytes_per_second) * cost_of(shape, cut, step_tokens=tokens)
    update = _UPDATE_PASSES * 4 * work.adapter.parameters / speed.bytes_per_second
    return max(tokens * a_token + update, examples * _HOST_SECONDS[work.engine])


def _scaled(work: Workload, cut: Cut, gpu: Gpu, cluster: Cluster, placement: Placement, *, alone: Cut) -> Scaled | None:
    """Beside one GPU, whose steps are cut as `alone` says."""
    speed, link = gpu.speed, gpu.link
    if cluster.ranks == 1 or speed is None or link is None:
        return None
    steps = dealt_steps(work.course, work.lengths, ranks=cluster.ranks)
    summing = sum_seconds(work.adapter.parameters, cluster, link, memory_bytes_per_second=speed.bytes_per_second)
    gathering = gather_seconds(row_bytes(work.shape), cluster, link)

    def seconds(share: Share) -> float:
        return _step_seconds(work, cut, speed, tokens=share.tokens, examples=share.examples)

    def by_one(whole: Share) -> float:
        return _step_seconds(work, alone, speed, tokens=whole.tokens, examples=whole.examples)

    def exchange(step: Dealt) -> float:
        most = max(step.shares, key=lambda share: share.tokens)
        passes = math.ceil(most.tokens / cut.micro_batch_tokens)
        if placement == "replicated":
            backward = (1 - FORWARD_SHARE) * seconds(most) / passes
            return left_of_sum(summing, parameters=work.adapter.parameters, backward=backward)
        return summing + waiting_for_gathers(
            gathering, layers=work.shape.layers, passes=passes, computing=seconds(most)
        )

    return Scaled(
        times_one=times_one(steps, seconds=seconds, exchange=exchange, alone=by_one),
        busiest=busiest(steps),
        exchange_seconds=sum(map(exchange, steps)) / len(steps),
    )


def _parts(work: Workload, shards: int) -> MemoryParts:
    return memory_parts(work.shape, work.adapter, work.engine, compiled=work.compiled, rows=work.rows, shards=shards)


def trained_tokens(work: Workload) -> int:
    """Real tokens of all steps."""
    return round(work.course.mean_length(work.lengths) * work.course.total)


def _evaluating_tokens(work: Workload, cut: Cut, ranks: int) -> float:
    """What the rank that does the most evaluates in all, by what it costs: it makes whole passes."""
    passes = max(1, math.ceil(work.validation_tokens / cut.evaluation_tokens))
    return FORWARD_SHARE * work.validation_tokens * work.evaluations * math.ceil(passes / ranks) / passes


def ask_for(work: Workload, cluster: Cluster = ALONE, placement: Placement = "replicated") -> Ask:
    """Host memory and disk: the base is on the disk as published and in 4 bits, and passes the host's memory."""
    base = (2 * work.shape.parameters if work.base_bytes is None else work.base_bytes) / GIB
    checkpoint = 8 * work.adapter.parameters / GIB
    layers, parts = work.shape.layers, _parts(work, cluster.ranks if placement == "sharded" else 1)
    whole = _parts(work, 1)
    packed = (whole.weights + whole.embeddings) / GIB
    least = parts.peak(layers=layers, tokens=work.max_length, kept_layers=0, recomputed_layers=layers)
    a_process = _HOST_GIB + 4 * work.adapter.parameters / GIB
    return Ask(
        gpus=cluster.gpus,
        nodes=cluster.nodes,
        gpu_memory_gib=math.ceil(least / GIB / _GPU_HEADROOM + _CONTEXT_GIB),
        host_memory_gib=_rounded(cluster.gpus * a_process + min(base, _LARGEST_SHARD_GIB)),
        disk_gib=_rounded(_SPARE_DISK_GIB + base + packed + (work.kept_checkpoints + 1) * checkpoint),
    )


def _rounded(gib: float) -> int:
    return math.ceil(gib / _ROUND_GIB) * _ROUND_GIB
