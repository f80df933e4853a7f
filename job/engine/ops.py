"""What the step asks of its elementwise parts; their meaning, shapes and formulas stand in `reference`."""

# ruff: noqa: D102 - said in `reference`

import importlib.util
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from job.engine import reference
from job.engine.weights import Quantised


class Ops(Protocol):
    """The elementwise parts: `reference`, or `kernels` where Triton runs."""

    def decode(self, weight: Quantised, out: Tensor) -> None: ...
    def rms_forward(self, x: Tensor, weight: Tensor, out: Tensor, inverse: Tensor, epsilon: float) -> None: ...
    def rms_backward_add(self, grad: Tensor, y: Tensor, weight: Tensor, inverse: Tensor, into: Tensor) -> None: ...
    def rotate_forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, inverse: Tensor | None, epsilon: float
    ) -> None: ...
    def rotate_backward(
        self,
        grad: Tensor,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        weight: Tensor | None,
        inverse: Tensor | None,
        out: Tensor,
    ) -> None: ...
    def swiglu_forward(self, gate_up: Tensor, out: Tensor) -> None: ...
    def swiglu_backward(self, gate_up: Tensor, grad: Tensor, d_gate_up: Tensor, out: Tensor) -> None: ...
    def cross_entropy_in_place(self, logits: Tensor, targets: Tensor, losses: Tensor, share: float) -> None: ...
    def dropout(self, x: Tensor, out: Tensor, seed: int, rate: float) -> None: ...
    def dropout_backward_add(self, grad: Tensor, into: Tensor, seed: int, rate: float) -> None: ...


def ops_of(device: torch.device) -> Ops:
    """The kernels on a GPU where Triton is installed, else the reference."""
    return _kernels_or_reference(device.type)


@cache
def _kernels_or_reference(kind: str) -> Ops:
    if kind != "cuda" or not has_triton():
        return reference
    from job.engine import kernels

    return kernels


def has_triton() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("triton") is not None
