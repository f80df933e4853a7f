"""Linear layers as the step uses them: layers that read the same input are one matrix, their LoRA adapters in it.

For layers with weights W (N rows in all, K columns) and adapters A, B of R ranks in all, the matrix is

    M = [ W  sB ]      forward    y  = [x  h] [W sB]^T    with h  = x A^T
        [ A   0 ]      backward   dx = [dy g] [W ; A]     with g  = dy sB

so forward and backward are one large product each, with a thin one for h or g. LoRA: Hu et al. 2021, arXiv
2106.09685, eq. 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from job.core.plan.memory import RANK_ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quantised:
    """A weight [N, K] in NF4 with double quantisation, as bitsandbytes lays it out.

    Dettmers et al. 2023, arXiv 2305.14314, section 3: blocks of 64 elements share a scale, which is itself an entry of
    an 8-bit code times an outer scale that 256 blocks share, plus an offset.
    """

    packed: Tensor
    """[N K / 2] uint8: two elements a byte, the first in the upper half."""
    scales: Tensor
    """[N K / 64] uint8: indices into `scales_code`."""
    scales_code: Tensor
    """[256] fp32: the values of the 8-bit code."""
    outer_scales: Tensor
    """[N K / 64 / 256, rounded up] fp32: one for 256 blocks."""
    offset: Tensor
    """[1] fp32, added to each scale."""
    code: Tensor
    """[16] fp32: the values of NF4."""
    height: int
    """N."""
    width: int
    """K."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantisedExperts:
    """The weights of a layer's experts, each [N, K] in NF4 by itself: what `Quantised` has, one below the other."""

    packed: Tensor
    """[E, N K / 2] uint8."""
    scales: Tensor
    """[E, N K / 64] uint8."""
    scales_code: Tensor
    """[256] fp32, the same for all."""
    outer_scales: Tensor
    """[E, N K / 64 / 256, rounded up] fp32."""
    offsets: Tensor
    """[E] fp32: each expert's scales have a mean of their own."""
    code: Tensor
    """[16] fp32."""
    height: int
    """N."""
    width: int
    """K."""

    def __len__(self) -> int:
        """E."""
        return len(self.packed)

    def __getitem__(self, expert: int) -> Quantised:
        return Quantised(
            packed=self.packed[expert],
            scales=self.scales[expert],
            scales_code=self.scales_code,
            outer_scales=self.outer_scales[expert],
            offset=self.offsets[expert : expert + 1],
            code=self.code,
            height=self.height,
            width=self.width,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """LoRA on one layer: y += scaling * B A dropout(x)."""

    a: Tensor
    """[r, K] fp32."""
    b: Tensor
    """[N, r] fp32."""
    scaling: float
    dropout: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    """One layer: frozen weight, perhaps a bias, perhaps an adapter."""

    weight: Quantised | Tensor
    """[N, K]; a tensor where the base has it unquantised, or where it is kept dequantised."""
    bias: Tensor | None
    adapter: Adapter | None

    @property
    def height(self) -> int:
        """N."""
        return self.weight.height if isinstance(self.weight, Quantised) else self.weight.shape[0]

    @property
    def width(self) -> int:
        """K."""
        return self.weight.width if isinstance(self.weight, Quantised) else self.weight.shape[1]


Dequantise = Callable[[Quantised, Tensor], None]
"""Writes a weight's values into rows of a matrix [N, K], whose rows may lie apart."""


class Group:
    """Layers that read the same input, as one matrix."""

    def __init__(self, layers: Sequence[Linear], dequantise: Dequantise) -> None:
        self._dequantise = dequantise
        self.layers = tuple(layers)
        self.width = layers[0].width
        self.rows: list[slice] = []
        """Rows of each layer in W."""
        self.ranks: list[slice | None] = []
        """Rows of each layer's adapter in A; None without an adapter."""
        self.height = self.rank = 0
        for layer in layers:
            self.rows.append(slice(self.height, self.height + layer.height))
            self.height += layer.height
            rank = 0 if layer.adapter is None else layer.adapter.a.shape[0]
            self.ranks.append(slice(self.rank, self.rank + rank) if rank else None)
            self.rank += rank
        self.padded_rank = -(-self.rank // RANK_ALIGNMENT) * RANK_ALIGNMENT
        """Ranks in all, rounded up so that the rows of M are aligned."""
        self.adapters = sum(layer.adapter is not None for layer in layers)
        self.dropout = max((layer.adapter.dropout for layer in layers if layer.adapter is not None), default=0.0)
        biases = [layer.bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])

    def make(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An M of zeros: [N + R, K + R rounded up]."""
        return torch.zeros(self.height + self.rank, self.width + self.padded_rank, dtype=dtype, device=device)

    @torch.no_grad()
    def fill_weights(self, matrix: Tensor) -> None:
        """Write W into M, dequantised."""
        for layer, rows in zip(self.layers, self.rows, strict=True):
            part = matrix[rows, : self.width]
            if isinstance(layer.weight, Quantised):
                self._dequantise(layer.weight, part)
            else:
                part.copy_(layer.weight)

    @torch.no_grad()
    def fill_adapters(self, matrix: Tensor) -> None:
        """Write the adapters' present values into M."""
        for layer, rows, ranks in zip(self.layers, self.rows, self.ranks, strict=True):
            if layer.adapter is not None and ranks is not None:
                corner = matrix[rows, self.width + ranks.start : self.width + ranks.stop]
                corner.copy_(layer.adapter.b * layer.adapter.scaling)
                matrix[self.height + ranks.start : self.height + ranks.stop, : self.width].copy_(layer.adapter.a)


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, summed and returned in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return torch.mm(left.t().float(), right.float())
