"""What training needs of a GPU's memory, part by part, and how a batch is cut for what is free."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PathName = Literal["fast", "generic"]
LogitsKind = Literal["plain", "scaled", "capped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What the planner needs to know of the device."""

    kind: Literal["cuda", "cpu"]
    free_bytes: int
    """Free before the base model is loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder with a gated MLP, from its config."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int
    heads: int
    key_heads: int
    head_width: int
    tied: bool = False
    """Whether the head is the embedding."""
    logits: LogitsKind = "plain"
    """What the model does to its logits."""

    @property
    def linear_parameters(self) -> int:
        """Of the layers' linear modules, which are in 4 bits."""
        attention = 2 * self.hidden * self.head_width * (self.heads + self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding_parameters(self) -> int:
        """Of embedding and head, which stay in bf16."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All, but for the norms."""
        return self.linear_parameters + self.embedding_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShape:
    """Sizes of a LoRA adapter and of what trains it."""

    parameters: int
    rank: int
    optimizer: str


_BF16, _FP32 = 2, 4
_NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits: itself, its share of an 8-bit scale for 64, and of an fp32 scale for 256 of those.

QLoRA, arXiv 2305.14314, section 3.
"""
_ALIGNED = 64
"""Ranks that stand beside an input are rounded up to a multiple of this."""
_ADAPTED = 7
"""Linear modules of a layer, each with an adapter where all are targets."""
_LOGITS_BYTES = 2**28
"""Of the logits that exist at once, in bf16: their gradient is written over them."""
_LOGITS_BY_AUTOGRAD = {"scaled": 3 * _FP32, "capped": 4 * _FP32}
"""Bytes of a logit that autograd goes back through: what softmax kept, and two gradients; of a bounded one, itself."""
_LOGITS_CHUNK = 1024
"""Targets whose logits autograd holds at once."""
_NOT_COMPILED = 1.5
"""Times as much of a token is kept in a layer that is not compiled."""
_OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_32bit": 8, "lion_8bit": 1, "sgd": 0}
_EIGHT_BIT_ADAM_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryParts:
    """Bytes of each part. The peak is during a step."""

    weights: int
    """The base in 4 bits."""
    embeddings: int
    """Embedding and head, bf16."""
    adapter: int
    """fp32."""
    gradients: int
    """fp32."""
    optimizer: int
    update: int
    """A copy of the adapter, kept until an update has proved finite."""
    workspace: int
    """Decoded weights of one layer, the head beside its adapter."""
    logits: int
    """At once, while the loss is computed."""
    decoded_layer: int
    """A layer that keeps its decoded weights, where the path can."""
    spared_workspace: int
    """What of the workspace is not needed when all layers keep theirs."""
    token_head: int
    """A token, outside the layers, while the loss is computed."""
    token: int
    """A token, outside the layers, on the way back through one."""
    token_layer: int
    """A token's activations in a layer."""
    token_recomputed: int
    """The same in a layer that goes forward again on the way back."""

    @property
    def fixed(self) -> int:
        """What does not depend on the micro-batch."""
        return (
            self.weights
            + self.embeddings
            + self.adapter
            + self.gradients
            + self.optimizer
            + self.update
            + self.workspace
        )

    def peak(self, *, layers: int, tokens: int, kept_layers: int, recomputed_layers: int) -> int:
        """Bytes at the peak of a step: with the logits, or right after them on the way back through the last layer.

        Layers that go forward again are the first ones, so the others have given theirs back by then.
        """
        whole = layers - recomputed_layers
        kept = whole * self.token_layer + recomputed_layers * self.token_recomputed
        at_the_head = self.logits + tokens * (self.token_head + kept)
        again = self.token_layer - self.token_recomputed if not whole else 0
        on_the_way_back = tokens * (self.token + kept + again)
        decoded = kept_layers * self.decoded_layer - (self.spared_workspace if kept_layers == layers else 0)
        return self.fixed + decoded + max(at_the_head, on_the_way_back)


def memory_parts(shape: ModelShape, adapter: AdapterShape, path: PathName, *, compiled: bool = True) -> MemoryParts:
    """Bytes of each part; the fast path has no layers that could be compiled.

    The fast path: what `job/engine/llama.py` keeps, tensor by tensor. The generic path, its layers compiled, keeps in
    bf16: a layer's input, the stream between its halves and both normed (4 hidden); query, key, value and the
    attention's result; gate, up and their product; the input of each adapter's ranks. With Llama-2-7B on an H200 that
    is within 2 % of what a prototype took: 37.7 GiB with 8,192 tokens, 70.1 with 16,384.
    """
    query, keys = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    wide, rank = _padded(3 * adapter.rank), _padded(adapter.rank)
    twice = _padded(2 * adapter.rank)
    logits = _LOGITS_BYTES
    if shape.logits != "plain":
        logits = _LOGITS_BY_AUTOGRAD[shape.logits] * _LOGITS_CHUNK * shape.vocabulary
    if path == "generic":
        kept = 4 * shape.hidden + 2 * (query + keys) + 3 * shape.intermediate + _ADAPTED * adapter.rank
        token_layer = math.ceil((1.0 if compiled else _NOT_COMPILED) * (_BF16 * kept + _FP32 * shape.heads))
        # One weight at a time, as it is and as a gradient's other factor.
        workspace = spared = 2 * shape.hidden * shape.intermediate * _BF16
        decoded = _BF16 * shape.linear_parameters // shape.layers if compiled else 0
        # The stream, its gradient, and what a product adds to each; the gradients of gate, up and their product.
        token = _BF16 * (4 * shape.hidden + 3 * shape.intermediate)
    else:
        kept = (shape.hidden + wide) + (query + 2 * keys) + query + rank + (shape.hidden + twice)
        kept += 2 * shape.intermediate + rank
        token_layer = _BF16 * kept + _FP32 * (2 + shape.heads)
        decoded = _BF16 * (
            (query + 2 * keys + 3 * adapter.rank) * (shape.hidden + wide)
            + (shape.hidden + adapter.rank) * (query + rank)
            + (2 * shape.intermediate + 2 * adapter.rank) * (shape.hidden + twice)
            + (shape.hidden + adapter.rank) * (shape.intermediate + rank)
        )
        head = _BF16 * (shape.vocabulary + adapter.rank) * (shape.hidden + rank)
        workspace, spared = decoded + head, decoded
        # The stream's gradient, and at the widest: the product and its gradient, the gradients of gate and up.
        token = _BF16 * (shape.hidden + rank + 4 * shape.intermediate + twice)
    return MemoryParts(
        weights=math.ceil(_NF4_BYTES * shape.linear_parameters),
        embeddings=_BF16 * shape.embedding_parameters,
        adapter=_FP32 * adapter.parameters,
        gradients=_FP32 * adapter.parameters,
        optimizer=_OPTIMIZER_BYTES.get(adapter.optimizer, _EIGHT_BIT_ADAM_BYTES) * adapter.parameters,
        update=_FP32 * adapter.parameters,
        workspace=workspace,
        logits=logits,
        decoded_layer=decoded,
        spared_workspace=spared,
        # The stream, its last place of each target, that one normed, and the gradient of it.
        token_head=_BF16 * (4 * shape.hidden + rank),
        token=token,
        token_layer=token_layer,
        token_recomputed=_BF16 * shape.hidden,
    )


def _padded(rank: int) -> int:
    return -(-rank // _ALIGNED) * _ALIGNED


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
_GIB = 2**30


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
