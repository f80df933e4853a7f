"""What the step works on: a decoder of the Llama family as tensors, a packed row, and what layers keep or recompute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from job.kernels.attention import Attention, Segments
from job.kernels.weights import Group


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderLayer:
    """A decoder layer: its linear layers in groups, its norms, its attention."""

    qkv: Group
    out: Group
    gate_up: Group
    down: Group
    attention_norm: Tensor
    """[hidden]: weight of the norm before attention."""
    mlp_norm: Tensor
    """[hidden]: weight of the norm before the MLP."""
    query_norm: Tensor | None
    """[head width]: weight of the norm of each query head (Qwen 3); None: there is no such norm."""
    key_norm: Tensor | None
    """[head width]: the same of each key head."""
    attention: Attention

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups, in the order of their use."""
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def numbers_of_a_token(self) -> int:
        """How many numbers a token leaves for the backward, about."""
        return sum(group.width + group.height for group in (self.qkv, self.gate_up, self.out))


class Arrivals(Protocol):
    """Brings a layer's weights to the device, where they are not all there."""

    def begin(self, *, trains: bool) -> None:
        """Before a pass through all layers."""
        ...

    def forward(self, layer: int) -> None:
        """Before a layer is passed forward."""
        ...

    def backward(self, layer: int) -> None:
        """Before it is passed backward, and before its activations are recomputed for that."""
        ...


class _Here:
    """All weights are on the device."""

    def begin(self, *, trains: bool) -> None:
        """Nothing to wait for."""

    def forward(self, layer: int) -> None:
        """As above."""

    def backward(self, layer: int) -> None:
        """As above."""


HERE: Arrivals = _Here()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoder:
    """A decoder of the Llama family as tensors, with its head."""

    embeddings: Tensor
    """[vocabulary, hidden]."""
    layers: Sequence[DecoderLayer]
    final_norm: Tensor
    head: Group
    heads: int
    key_heads: int
    head_width: int
    epsilon: float
    """Added to the mean square, in every norm."""
    rotation: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Positions [T] -> cos and sin, each [T, head width / 2] fp32."""
    arrivals: Arrivals = HERE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedRow:
    """Documents packed into a row: T tokens, N targets, on the device."""

    ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64; each document starts at 0."""
    segments: Segments
    places: Tensor
    """[N] int64: places in T whose next token is a target."""
    targets: Tensor
    """[N] int64: those next tokens; -1: no target. Places without a target may repeat, but are no target's place."""
    weight_per_target: Tensor
    """[1] fp32: one over the targets of the whole step."""
    seed: Tensor | None
    """[1] int64, below 2**31: seed of the dropout masks; None: no dropout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What layers keep and what they recompute: memory against time."""

    kept_layers: int
    """Layers that keep their dequantised weights, from the first one on; the others dequantise them at each use."""
    recomputed_layers: int
    """Layers that keep only their input, from the first one on; the backward recomputes their activations."""
