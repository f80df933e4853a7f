"""What the step asks of its elementwise parts; their meaning, shapes and formulas stand in `reference`."""

# ruff: noqa: D102 - said in `reference`

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from job.kernels.weights import Quantised


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Masks:
    """Which elements of an input [T, K] each of its adapters sees: drawn from the seed wherever they are needed."""

    seed: Tensor
    """[1] int64 on the device, below 2**31: of the micro-batch."""
    site: int
    """The input's own number in the model."""
    adapters: int
    """Each has its own mask."""
    rate: float
    """Share of elements that are dropped; the others are divided by what is left."""


class Ops(Protocol):
    """The elementwise parts: `reference`, or `kernels` where Triton runs."""

    def dequantise(self, weight: Quantised, out: Tensor) -> None: ...
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
