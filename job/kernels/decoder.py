"""What the step works on: a decoder of the Llama family as tensors, a packed row, and what is recomputed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from job.kernels.attention import Attention, Segments
from job.kernels.weights import Group


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderLayer:
    """One decoder layer."""

    qkv: Group
    out: Group
    gate_up: Group
    down: Group
    attention_norm: Tensor
    """[hidden]."""
    mlp_norm: Tensor
    """[hidden]."""
    query_norm: Tensor | None
    """[head width], of each query head (Qwen 3)."""
    key_norm: Tensor | None
    attention: Attention

    @property
    def groups(self) -> tuple[Group, ...]:
        """All of them, in the order of their use."""
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoder:
    """A model of the family: what its step is made of."""

    embeddings: Tensor
    """[vocabulary, hidden]."""
    layers: Sequence[DecoderLayer]
    final_norm: Tensor
    head: Group
    heads: int
    key_heads: int
    head_width: int
    epsilon: float
    """Of every norm."""
    rotation: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Positions [T] -> cos and sin, each [T, head width / 2] fp32."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedRow:
    """Segments in a row: T tokens, N targets, on the device."""

    ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64; each document starts at 0."""
    segments: Segments
    places: Tensor
    """[N] int64: places in T whose next token is a target."""
    targets: Tensor
    """[N] int64: those next tokens; below 0: none, and then its place is no other target's, or that of such a one."""
    weight_per_target: Tensor
    """[1] fp32: one over the targets of the whole step."""
    seed: Tensor | None
    """[1] int64, below 2**31, of the dropout masks; None: no dropout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What is computed again to save memory."""

    kept_layers: int
    """So many layers keep their decoded weights; the others decode them at each use."""
    recomputed_layers: int
    """So many layers keep only their input, and go forward again on the way back."""
