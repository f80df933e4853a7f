"""What training needs of a GPU's memory, part by part: bytes from the sizes of base and adapter alone."""

import math
from dataclasses import dataclass
from typing import Literal

from job.core.data.packing import MOST_PADDING, Rows

GIB = 2**30
EngineName = Literal["fast", "generic"]
"""What computes the gradients: the hand-written step, or autograd."""
WantedEngine = Literal["auto", EngineName]
"""What a user can ask for."""
LogitsKind = Literal["plain", "scaled", "capped"]
Placement = Literal["replicated", "sharded"]
"""Where the base is: the whole of it on each GPU, or each of its layers spread over all of them."""
ComputeDtype = Literal["bf16", "fp32"]
"""What the base computes in: fp32 on processors without instructions for bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What the planner needs to know of the device."""

    kind: Literal["cuda", "cpu"]
    name: str
    """The kind of device, as it stands in the report."""
    free_bytes: int
    """Free before the base model is loaded."""
    compute_dtype: ComputeDtype = "bf16"
    """All GPUs that are accepted compute in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsShape:
    """Sizes of a mixture's experts that are in 4 bits."""

    parameters: int
    """Of all layers' experts."""
    sides: int
    """Height and width of all their matrices: parameters of an adapter of rank 1 on each."""
    number: int
    """Of a layer's experts."""
    chosen: int
    """What a token goes through of them."""
    first: int
    """Height of an expert's first matrix: what is kept of a token that goes through it."""
    inner: int
    """Width of its second matrix."""
    largest: int
    """Elements of the matrices that are dequantised at once: one of each expert of a layer."""
    beside: int = 0
    """What a dense block beside a layer's experts, which all tokens go through, widens a token to."""
    has_bias: bool = False
    """Whether something is added to their products."""
    gate_in_one: bool = True
    """Whether what stands between their products is one kernel; else autograd goes through transformers' code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentShape:
    """What a decoder's recurrent and convolutional layers need beside their linear modules, by transformers' code."""

    layers: int
    """How many there are."""
    kept: int
    """Bytes of a token that one of them keeps for the backward, with what goes into its linear modules."""
    backward: int
    """Bytes of a token that its backward holds at most beside those."""
    moved: int
    """Bytes of a token that pass the memory, forward and backward."""
    moved_by_length: int = 0
    """The same for each token of its document, where code goes token by token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder."""

    layers: int
    hidden: int
    intermediate: int
    """What the second half of a layer widens a token to; of experts, all that a token goes through."""
    vocabulary: int
    positions: int
    heads: int
    key_heads: int
    head_width: int
    linear_parameters: int
    """Of the layers' linear modules, which are in 4 bits."""
    whole_parameters: int
    """All others, which stay in bf16: embedding and head, norms, routers."""
    logits: LogitsKind = "plain"
    """What the model does to its logits."""
    norms: int = 2
    """Of a layer, over a token's whole width; Gemma's have four."""
    head_norms: bool = False
    """Whether queries and keys are normed, each head by itself."""
    layer_whole_parameters: int = 0
    """Of the whole ones, those in matrices of layers: routers, and experts that are not in 4 bits."""
    experts: ExpertsShape | None = None
    """Of a mixture whose experts are in 4 bits as well; None: it has none."""
    recurrent: RecurrentShape | None = None
    """Of a decoder that looks at other tokens by more than attention; None: it does not."""

    @property
    def four_bit_parameters(self) -> int:
        """Those in 4 bits."""
        return self.linear_parameters + (0 if self.experts is None else self.experts.parameters)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.four_bit_parameters + self.whole_parameters

    @property
    def active_parameters(self) -> float:
        """Those in 4 bits that a token is multiplied with."""
        if self.experts is None:
            return self.linear_parameters
        return self.linear_parameters + self.experts.parameters * self.experts.chosen / self.experts.number


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShape:
    """Sizes of a LoRA adapter and of what trains it."""

    parameters: int
    rank: int
    optimizer: str
    by_peft: bool = False
    """Whether PEFT's own layers compute it, which keep an fp32 copy of each one's input."""
    on_experts: bool = False
    """Whether each expert has factors of its own."""

    def active_parameters(self, shape: ModelShape) -> float:
        """Those that a token is multiplied with."""
        if shape.experts is None or not self.on_experts:
            return self.parameters
        of_experts = self.rank * shape.experts.sides
        return self.parameters - of_experts * (1 - shape.experts.chosen / shape.experts.number)


NF4_BLOCK = 64
"""Weights in 4 bits that share a scale: bitsandbytes' own choice for a layer, which transformers has no word for."""
NF4_OUTER_BLOCK = 256
"""Scales that share an outer scale (double quantisation)."""
_BF16, _FP32, _INT64 = 2, 4, 8
_NF4_BYTES = 1 / 2 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_OUTER_BLOCK)
"""One weight in 4 bits, with its share of an 8-bit scale and of an fp32 outer scale.

QLoRA, arXiv 2305.14314, section 3.
"""
RANK_ALIGNMENT = 64
"""Ranks that stand beside an input are rounded up to a multiple of this: rows start where tensor cores read fastest."""
_ADAPTED, _ADAPTED_IN_ATTENTION = 7, 4
"""Linear modules of a layer, each with an adapter where all are targets; and those outside its second half."""
_LOGITS_BYTES = 2**28
"""The most logits that exist at once, in bf16: their gradient is written over them."""
_LOGITS_BY_AUTOGRAD = {"scaled": 3 * _FP32, "capped": 4 * _FP32}
"""Bytes of a logit in autograd's backward: what softmax kept, and two gradients; a capped one itself as well."""
_LOGITS_CHUNK = 1024
"""Targets whose logits autograd holds at once."""
_NOT_COMPILED = 1.5
"""Times as much of a token is kept in a layer that is not compiled."""
OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "sgd": 0,
}
"""State of a trained parameter, by the recipe's name of the optimizer; the scales of 8-bit states are 1/32 more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryParts:
    """Bytes of each part. The peak is during a step."""

    weights: int
    """The base in 4 bits; where it is sharded our share of it, and the two layers that are there at a time."""
    embeddings: int
    """Embedding and head, and what else is not in 4 bits: bf16."""
    adapter: int
    """fp32."""
    gradients: int
    """fp32."""
    optimizer: int
    update: int
    """A copy of the adapter, kept until an update has proved finite."""
    workspace: int
    """Dequantised weights of one layer, the head beside its adapter."""
    logits: int
    """At once, while the loss is computed."""
    dequantised_layer: int
    """A layer that keeps its dequantised weights, where the engine can."""
    spared_workspace: int
    """What of the workspace is not needed when all layers keep theirs."""
    token_head: int
    """A token, outside the layers, while the loss is computed."""
    token: int
    """A token, outside the layers, in the backward of one, beside the workspace."""
    token_alone: int
    """The same while nothing is in the workspace, where that may be more."""
    token_layer: int
    """A token's activations in a layer; where layers differ in them, the mean."""
    token_largest: int
    """The same of the layer that keeps the most."""
    token_recomputed: int
    """The same in a layer that recomputes them in the backward."""

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
        """Bytes at the peak of a step: with the logits, or right after them in the backward of the last layer.

        Layers that recompute are the first ones: when their turn comes, the others have freed their activations.
        """
        whole = layers - recomputed_layers
        kept = whole * self.token_layer + recomputed_layers * self.token_recomputed
        at_the_head = self.logits + tokens * (self.token_head + kept)
        again = self.token_largest - self.token_recomputed if not whole else 0
        at_once = max(tokens * self.token, tokens * self.token_alone - self.workspace)
        in_the_backward = at_once + tokens * (kept + again)
        dequantised = kept_layers * self.dequantised_layer - (self.spared_workspace if kept_layers == layers else 0)
        return self.fixed + dequantised + max(at_the_head, in_the_backward)


def memory_parts(
    shape: ModelShape,
    adapter: AdapterShape,
    engine: EngineName,
    *,
    compiled: bool = True,
    rows: Rows = "packed",
    shards: int = 1,
) -> MemoryParts:
    """Bytes of each part; the fast engine has no layers that could be compiled, and its rows are packed.

    The fast engine: what `job/kernels/llama_step.py` keeps, tensor by tensor. The generic one, its layers compiled,
    keeps in bf16: a layer's input, the stream between its halves, and what each norm gives (4 hidden); query, key,
    value and the attention's result; gate, up and their product; the input of each adapter's ranks. Packed mixtures and
    decoders with recurrent layers, which are not compiled, are counted as autograd saves it.

    With `shards` the layers' weights are spread over so many GPUs, two layers are whole at a time, and none is kept
    dequantised.
    """
    query, keys = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    wide, rank = _padded(3 * adapter.rank), _padded(adapter.rank)
    twice = _padded(2 * adapter.rank)
    logits = _LOGITS_BYTES
    if shape.logits != "plain":
        logits = _LOGITS_BY_AUTOGRAD[shape.logits] * _LOGITS_CHUNK * shape.vocabulary
    token_alone = 0
    if engine == "generic":
        # One weight at a time, as it is and as a gradient's other factor.
        workspace = spared = 2 * shape.hidden * shape.intermediate * _BF16
        dequantised = _BF16 * shape.linear_parameters // shape.layers if compiled else 0
        is_counted = shape.recurrent is not None or (shape.experts is not None and rows == "packed")
        token_layer = _kept_by_generic(shape, adapter, compiled=compiled, is_counted=is_counted)
        # The stream, its gradient, and what a product adds to each; the gradients of gate, up and their product.
        token = _BF16 * (4 * shape.hidden + 3 * shape.intermediate)
        if shape.experts is not None:
            workspace = max(workspace, _BF16 * shape.experts.largest)
            kept, token, token_alone = _of_experts(shape.experts, shape.hidden, adapter, token, is_counted=is_counted)
            token_layer += kept
    else:
        kept = (shape.hidden + wide) + (query + 2 * keys) + query + rank + (shape.hidden + twice)
        kept += 2 * shape.intermediate + rank
        token_layer = _BF16 * kept + _FP32 * (2 + shape.heads)
        dequantised = _BF16 * (
            (query + 2 * keys + 3 * adapter.rank) * (shape.hidden + wide)
            + (shape.hidden + adapter.rank) * (query + rank)
            + (2 * shape.intermediate + 2 * adapter.rank) * (shape.hidden + twice)
            + (shape.hidden + adapter.rank) * (shape.intermediate + rank)
        )
        head = _BF16 * (shape.vocabulary + adapter.rank) * (shape.hidden + rank)
        workspace, spared = dequantised + head, dequantised
        # The stream's gradient, and at the widest: the product and its gradient, the gradients of gate and up.
        token = _BF16 * (shape.hidden + rank + 4 * shape.intermediate + twice)
    weights, whole = _of_the_base(shape, shards)
    largest = token_layer
    if shape.recurrent is not None:
        largest += shape.recurrent.kept
        token_layer += math.ceil(shape.recurrent.layers * shape.recurrent.kept / shape.layers)
        token = max(token, shape.recurrent.backward)
    padded = 1 + MOST_PADDING if rows == "padded" else 1.0
    return MemoryParts(
        weights=weights,
        embeddings=whole,
        adapter=_FP32 * adapter.parameters,
        gradients=_FP32 * adapter.parameters,
        optimizer=OPTIMIZER_BYTES[adapter.optimizer] * adapter.parameters,
        update=_FP32 * adapter.parameters,
        workspace=workspace,
        logits=logits,
        dequantised_layer=dequantised if shards == 1 else 0,
        spared_workspace=spared,
        # The stream, its last place of each target, that one normed, and the gradient of it.
        token_head=_BF16 * (4 * shape.hidden + rank),
        token=math.ceil(padded * token),
        token_alone=math.ceil(padded * token_alone),
        token_layer=math.ceil(padded * token_layer),
        token_largest=math.ceil(padded * largest),
        token_recomputed=math.ceil(padded * _BF16 * shape.hidden),
    )


def row_bytes(shape: ModelShape) -> int:
    """What of a layer a sharded base gathers, on average: weights in 4 bits, and matrices that stay in bf16."""
    return math.ceil((_NF4_BYTES * shape.four_bit_parameters + _BF16 * shape.layer_whole_parameters) / shape.layers)


def _of_the_base(shape: ModelShape, shards: int) -> tuple[int, int]:
    """Bytes of what is spread over GPUs, or could be, and of all else that is not in 4 bits."""
    weights, whole = math.ceil(_NF4_BYTES * shape.four_bit_parameters), shape.whole_parameters
    if shards > 1:
        weights += _BF16 * shape.layer_whole_parameters
        whole -= shape.layer_whole_parameters
        weights = weights // shards + 2 * weights // shape.layers
    return weights, _BF16 * whole


def _dense_width(shape: ModelShape) -> int:
    """What a layer's dense block widens a token to; 0: it has none."""
    return shape.intermediate if shape.experts is None else shape.experts.beside


def _kept_by_generic(shape: ModelShape, adapter: AdapterShape, *, compiled: bool, is_counted: bool) -> int:
    """Bytes of a token in a layer, without its experts."""
    query, keys = shape.heads * shape.head_width, shape.key_heads * shape.head_width
    if adapter.by_peft:
        return _kept_by_peft(shape, adapter, query=query, keys=keys)
    if is_counted:
        return _kept_by_autograd(shape, adapter, query=query, keys=keys)
    kept = (2 + shape.norms) * shape.hidden + 2 * (query + keys) + 3 * _dense_width(shape) + _ADAPTED * adapter.rank
    return math.ceil((1.0 if compiled else _NOT_COMPILED) * (_BF16 * kept + _FP32 * shape.heads))


def _kept_by_autograd(shape: ModelShape, adapter: AdapterShape, *, query: int, keys: int) -> int:
    """Bytes of a token in a layer that is not compiled, without experts and recurrence, tensor by tensor.

    Each norm's input, its root (both fp32) and result; query, key, value, the attention's result and sums; each
    adapter's ranks; of a dense block gate, its activation, up and their product. Not the stream. Recurrent layers have
    attention's part as well: what others' attention has besides, norms of heads and a gate, is as much.
    """
    norms = shape.norms * (_FP32 * (shape.hidden + 1) + _BF16 * shape.hidden)
    if shape.head_norms:
        norms += _FP32 * (query + keys + shape.heads + shape.key_heads)
    attention = _BF16 * 2 * (query + keys) + _FP32 * shape.heads
    dense, adapted = _dense_width(shape), _ADAPTED if _dense_width(shape) else _ADAPTED_IN_ATTENTION
    return norms + attention + _BF16 * (adapted * adapter.rank + 4 * dense)


def _kept_by_peft(shape: ModelShape, adapter: AdapterShape, *, query: int, keys: int) -> int:
    """Bytes of a token in a layer whose linear modules are PEFT's own.

    Of each norm and of each adapter its input in fp32; attention's, and gate, its activation and up in bf16.
    """
    in_fp32 = (5 + shape.norms) * shape.hidden + query + shape.intermediate + _ADAPTED * adapter.rank
    in_fp32 += shape.heads
    return _FP32 * in_fp32 + _BF16 * (2 * (query + keys) + 3 * shape.intermediate)


def _of_experts(
    of: ExpertsShape, hidden: int, adapter: AdapterShape, token: int, *, is_counted: bool
) -> tuple[int, int, int]:
    """Bytes of a token: what a layer's experts keep; the most in their backward beside weights; and without weights.

    Each expert's first product is kept, and the router's probabilities and choices. Beside weights are the gradients of
    the first product and of what went into it, of the stream, and what is added to that. Without them those of rows, of
    the gate's result and of the first product, and that result again; in fp32 two factors and their product, whose sum
    a row's weight gets: of rows where there is a bias, of the gate's result where autograd goes through it. An adapter
    on experts adds once more to what went in. Where that is not counted, all of it is there beside `token`.
    """
    kept = _BF16 * of.chosen * of.first + 5 * _INT64 * of.chosen + (1 if is_counted else 2) * _FP32 * of.number
    if not is_counted:
        return kept, token + _BF16 * of.chosen * (3 * hidden + of.first + 2 * of.inner), 0
    first, summed = of.first + hidden, max(hidden * of.has_bias, of.inner * (not of.gate_in_one))
    alone = max(_BF16 * (first + 2 * of.inner) + 3 * _FP32 * summed, _BF16 * (first + hidden * adapter.on_experts))
    beside_weights = max(2 * hidden + of.chosen * first, 4 * hidden + 3 * of.beside)
    return kept, _BF16 * beside_weights, _BF16 * hidden + of.chosen * alone


def _padded(rank: int) -> int:
    return -(-rank // RANK_ALIGNMENT) * RANK_ALIGNMENT
