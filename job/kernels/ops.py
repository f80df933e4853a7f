"""The ops that have two implementations, plain torch and Triton; their shapes and formulas stand in `reference`."""

# ruff: noqa: D102 - documented in `reference`

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from job.kernels.weights import Quantised, QuantisedExperts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Masks:
    """Dropout masks of an input [T, K], one for each adapter that reads it: a hash, computed where it is needed."""

    seed: Tensor
    """[1] int64 on the device, below 2**31: of the micro-batch, or of one layer in it."""
    site: int
    """Number of the input among those that share the seed."""
    adapters: int
    """Adapters that read the input; each has its own mask."""
    rate: float
    """Share of elements that are dropped; the others are divided by 1 - rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What stands between the products of an expert: (up + 1?) gate sigmoid(alpha gate), [S, 2 I] -> [S, I].

    SwiGLU, Shazeer 2020, arXiv 2002.05202, eq. 6; with a limit and one more, as gpt-oss has it.
    """

    interleaved: bool = False
    """Whether gate and up stand by turns; else the gates stand before."""
    alpha: float = 1.0
    limit: float | None = None
    """Gates above it count as it, and so do ups above it, or below its negative."""
    one_more: bool = False
    """Whether one is added to up."""

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, as they stand in z."""
        if self.interleaved:
            return z[..., ::2], z[..., 1::2]
        half = z.shape[-1] // 2
        return z[..., :half], z[..., half:]

    def __call__(self, z: Tensor) -> Tensor:
        """The formula under autograd."""
        gate, up = self.parts(z)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1 if self.one_more else up) * gate * torch.sigmoid(self.alpha * gate)


class Ops(Protocol):
    """Implemented by `reference`, and by `triton_elementwise` where Triton runs."""

    def dequantise(self, weight: Quantised, out: Tensor) -> None: ...
    def dequantise_experts(self, weights: QuantisedExperts, rows: Tensor, out: Tensor) -> None: ...
    def gate_forward(self, z: Tensor, gate: Gate, out: Tensor) -> None: ...
    def gate_backward(
        self, z: Tensor, grad: Tensor, row_weights: Tensor, gate: Gate, d_z: Tensor, out: Tensor, shares: Tensor
    ) -> None: ...
    def combine_rows(self, rows: Tensor, places: Tensor, weights: Tensor | None, out: Tensor) -> None: ...
    def sums_by_expert(self, left: Tensor, right: Tensor, ends: Tensor, out: Tensor) -> None: ...
    def rms_forward(self, x: Tensor, weight: Tensor, out: Tensor, rstd: Tensor, epsilon: float) -> None: ...
    def rms_backward_add(self, grad: Tensor, y: Tensor, weight: Tensor, rstd: Tensor, into: Tensor) -> None: ...
    def rotate_forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, rstd: Tensor | None, epsilon: float
    ) -> None: ...
    def rotate_backward(
        self,
        grad: Tensor,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        weight: Tensor | None,
        rstd: Tensor | None,
        out: Tensor,
    ) -> None: ...
    def swiglu_forward(self, gate_up: Tensor, out: Tensor) -> None: ...
    def swiglu_backward(self, gate_up: Tensor, grad: Tensor, d_gate_up: Tensor, out: Tensor) -> None: ...
    def cross_entropy_in_place(
        self, logits: Tensor, targets: Tensor, losses: Tensor, weight_per_target: Tensor
    ) -> None: ...
    def masked_ranks(self, x: Tensor, a: Tensor, out: Tensor, masks: Masks) -> None: ...
    def masked_gradient(self, thin: Tensor, x: Tensor, masks: Masks) -> Tensor: ...
    def masked_add(self, thin: Tensor, a: Tensor, into: Tensor, masks: Masks) -> None: ...
