"""A linear layer with its adapter as a fused op with a backward of its own; compilers do not look inside."""

# ruff: noqa: PLR0913, PLR0917 - an op takes tensors and numbers by position

from typing import Any

import torch
from torch import Tensor

from job.kernels import linear as layer
from job.kernels.weights import Adapter, Linear, Quantised


def linear(x: Tensor, of: Linear, mask_seed: Tensor | None) -> Tensor:
    """The layer's result.

    Args:
        x: [..., K].
        of: the layer.
        mask_seed: [1] int64 on the device: seed of the adapter's dropout; None: no dropout. A tensor, because a number
            would become part of compiled code.

    Returns:
        [..., N].
    """
    weight, scales = of.weight, []
    if isinstance(weight, Quantised):
        scales = [weight.scales, weight.scales_code, weight.outer_scales, weight.offset, weight.code]
        weight = weight.packed
    adapter = of.adapter
    y, _ = _forward_op(
        x.reshape(-1, of.width),
        weight,
        scales,
        of.bias,
        None if adapter is None else adapter.a,
        None if adapter is None else adapter.b,
        mask_seed,
        0.0 if adapter is None else adapter.scaling,
        0.0 if adapter is None else adapter.dropout,
        of.height,
    )
    result: Tensor = y.view(*x.shape[:-1], of.height)
    return result


@torch.library.custom_op(
    "qlora_job::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor[] scales, Tensor? bias, Tensor? a, Tensor? b, Tensor? mask_seed,"
    " float scaling, float dropout, int height) -> (Tensor, Tensor)",
)
def _forward_op(
    x: Tensor,
    weight: Tensor,
    scales: list[Tensor],
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    mask_seed: Tensor | None,
    scaling: float,
    dropout: float,
    height: int,
) -> tuple[Tensor, Tensor]:
    of = _layer(x, weight, scales, bias, a, b, scaling, dropout, height)
    return layer.forward(x, of, layer.masks_of(of.adapter, mask_seed))


@_forward_op.register_fake
def _shapes(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    a, height = arguments[3], arguments[-1]
    return x.new_empty(x.shape[0], height), x.new_empty(x.shape[0], 0 if a is None else a.shape[0])


@torch.library.custom_op(
    "qlora_job::linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor h, Tensor weight, Tensor[] scales, Tensor? a, Tensor? b, Tensor? mask_seed,"
    " float scaling, float dropout, int height, bool wants_x) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    scales: list[Tensor],
    a: Tensor | None,
    b: Tensor | None,
    mask_seed: Tensor | None,
    scaling: float,
    dropout: float,
    height: int,
    wants_x: bool,  # noqa: FBT001 - as above
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and b, each empty where there is none."""
    of = _layer(x, weight, scales, None, a, b, scaling, dropout, height)
    grads = layer.backward(grad.contiguous(), x, h, of, layer.masks_of(of.adapter, mask_seed), wants_x=wants_x)
    d_x, d_a, d_b = (x.new_empty(0) if each is None else each for each in grads)
    return d_x, d_a, d_b


@_backward_op.register_fake
def _backward_shapes(_grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, b, wants_x = arguments[3], arguments[4], arguments[-1]
    d_x = x.new_empty(x.shape if wants_x else 0)
    if a is None:
        return d_x, x.new_empty(0), x.new_empty(0)
    return d_x, torch.empty_like(a), torch.empty_like(b)


def _layer(
    x: Tensor,
    weight: Tensor,
    scales: list[Tensor],
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scaling: float,
    dropout: float,
    height: int,
) -> Linear:
    adapter = None if a is None or b is None else Adapter(a=a, b=b, scaling=scaling, dropout=dropout)
    if not scales:
        return Linear(weight=weight, bias=bias, adapter=adapter)
    inner, inner_code, outer, offset, code = scales
    quantised = Quantised(
        packed=weight,
        scales=inner,
        scales_code=inner_code,
        outer_scales=outer,
        offset=offset,
        code=code,
        height=height,
        width=x.shape[1],
    )
    return Linear(weight=quantised, bias=bias, adapter=adapter)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, scales, _bias, a, b, mask_seed, *numbers = inputs
    ctx.save_for_backward(x, output[1], weight, a, b, mask_seed, *scales)
    ctx.numbers = numbers


def _backward(ctx: Any, grad: Tensor, _grad_of_h: Tensor) -> tuple[Any, ...]:
    x, h, weight, a, b, mask_seed, *scales = ctx.saved_tensors
    wants_x = ctx.needs_input_grad[0]
    d_x, d_a, d_b = _backward_op(grad, x, h, weight, scales, a, b, mask_seed, *ctx.numbers, wants_x)
    adapted = a is not None
    return (
        *(d_x if wants_x else None, None, [None] * len(scales), None),
        *(d_a if adapted else None, d_b if adapted else None),
        *(None, None, None, None),
    )


_forward_op.register_autograd(_backward, setup_context=_keep)
