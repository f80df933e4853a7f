"""What `reference` computes, as Triton kernels: one kernel each, sums in fp32. Imported only where Triton runs.

Rows may lie apart (a stride for rows, none inside one), so that results land where the next product reads them.
"""

# Triton's own language: capitals for pointers and compile-time constants, many arguments by position.
# ruff: noqa: N803, PLR0913, PLR0917, ANN001, ANN202
# ruff: noqa: D103 - documented in `reference`

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl
from torch import Tensor

from job.core.plan.memory import NF4_BLOCK, NF4_OUTER_BLOCK
from job.kernels.triton_dropout import masked_add, masked_gradient, masked_ranks
from job.kernels.triton_experts import (
    combine_rows,
    dequantise_experts,
    gate_backward,
    gate_forward,
    sums_by_expert,
)
from job.kernels.weights import Quantised

__all__ = [
    "combine_rows",
    "cross_entropy_in_place",
    "dequantise",
    "dequantise_experts",
    "gate_backward",
    "gate_forward",
    "masked_add",
    "masked_gradient",
    "masked_ranks",
    "rms_backward_add",
    "rms_forward",
    "rotate_backward",
    "rotate_forward",
    "sums_by_expert",
    "swiglu_backward",
    "swiglu_forward",
]
_BLOCK, _OUTER = tl.constexpr(NF4_BLOCK), tl.constexpr(NF4_OUTER_BLOCK)
"""NF4's blocks, as compile-time constants."""


@triton.jit
def _dequantise(
    PACKED,
    SCALES,
    SCALES_CODE,
    OUTER_SCALES,
    OFFSET,
    CODE,
    OUT,
    row_stride,
    width,
    blocks,
    ROWS: tl.constexpr,
    IN_ONE_ROW: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = block < blocks
    at = tl.load(SCALES + block, mask=valid, other=0).to(tl.int32)
    outer = tl.load(OUTER_SCALES + block // _OUTER, mask=valid, other=0.0)
    scale = tl.load(SCALES_CODE + at, mask=valid, other=0.0) * outer + tl.load(OFFSET)
    pairs = tl.load(
        PACKED + block[:, None] * (_BLOCK // 2) + tl.arange(0, _BLOCK // 2)[None, :], mask=valid[:, None], other=0
    ).to(tl.int32)
    first = tl.load(CODE + (pairs >> 4)) * scale[:, None]
    second = tl.load(CODE + (pairs & 15)) * scale[:, None]
    values = tl.interleave(first, second).to(OUT.dtype.element_ty)
    if IN_ONE_ROW:
        row = block * _BLOCK // width
        column = block * _BLOCK - row * width
        place = (row * row_stride + column)[:, None] + tl.arange(0, _BLOCK)[None, :]
    else:
        element = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
        row = element // width
        place = row * row_stride + element - row * width
    tl.store(OUT + place, values, mask=valid[:, None])


def dequantise(weight: Quantised, out: Tensor) -> None:
    blocks = weight.packed.numel() * 2 // NF4_BLOCK
    rows = 32
    _dequantise[(triton.cdiv(blocks, rows),)](
        weight.packed,
        weight.scales,
        weight.scales_code,
        weight.outer_scales,
        weight.offset,
        weight.code,
        out,
        out.stride(0),
        weight.width,
        blocks,
        ROWS=rows,
        IN_ONE_ROW=weight.width % NF4_BLOCK == 0,
        num_warps=4,
    )


@triton.jit
def _rms_forward(X, x_stride, WEIGHT, Y, y_stride, RSTD, width, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = column < width
    x = tl.load(X + row * x_stride + column, mask=valid, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x) / width + epsilon)
    weight = tl.load(WEIGHT + column, mask=valid, other=0.0).to(tl.float32)
    normed = (x * rstd).to(Y.dtype.element_ty).to(tl.float32)
    tl.store(Y + row * y_stride + column, (normed * weight).to(Y.dtype.element_ty), mask=valid)
    tl.store(RSTD + row, rstd)


def rms_forward(x: Tensor, weight: Tensor, out: Tensor, rstd: Tensor, epsilon: float) -> None:
    rows, width = x.shape
    block = triton.next_power_of_2(width)
    _rms_forward[(rows,)](x, x.stride(0), weight, out, out.stride(0), rstd, width, epsilon, BLOCK=block, num_warps=8)


@triton.jit
def _rms_backward(DY, dy_stride, Y, y_stride, WEIGHT, RSTD, DX, dx_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = column < width
    weight = tl.load(WEIGHT + column, mask=valid, other=1.0).to(tl.float32)
    normed = tl.load(Y + row * y_stride + column, mask=valid, other=0.0).to(tl.float32) / weight
    scaled = tl.load(DY + row * dy_stride + column, mask=valid, other=0.0).to(tl.float32) * weight
    change = tl.load(RSTD + row) * (scaled - normed * (tl.sum(scaled * normed) / width))
    place = DX + row * dx_stride + column
    tl.store(place, (tl.load(place, mask=valid, other=0.0).to(tl.float32) + change).to(DX.dtype.element_ty), mask=valid)


def rms_backward_add(grad: Tensor, y: Tensor, weight: Tensor, rstd: Tensor, into: Tensor) -> None:
    rows, width = grad.shape
    block = triton.next_power_of_2(width)
    _rms_backward[(rows,)](
        grad,
        grad.stride(0),
        y,
        y.stride(0),
        weight,
        rstd,
        into,
        into.stride(0),
        width,
        BLOCK=block,
        num_warps=8,
    )


@triton.jit
def _rotate_forward(
    X, x_stride, COS, SIN, WEIGHT, RSTD, heads, epsilon, NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    valid = (head < heads)[:, None] & (column < HALF)[None, :]
    place = X + token * x_stride + head[:, None] * (2 * HALF) + column[None, :]
    first = tl.load(place, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=valid, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + epsilon)
        tl.store(RSTD + token * heads + head, rstd, mask=head < heads)
        first = (first * rstd[:, None]).to(X.dtype.element_ty).to(tl.float32)
        second = (second * rstd[:, None]).to(X.dtype.element_ty).to(tl.float32)
        first = first * tl.load(WEIGHT + column).to(tl.float32)[None, :]
        second = second * tl.load(WEIGHT + HALF + column).to(tl.float32)[None, :]
    cos = tl.load(COS + token * HALF + column)[None, :]
    sin = tl.load(SIN + token * HALF + column)[None, :]
    tl.store(place, (first * cos - second * sin).to(X.dtype.element_ty), mask=valid)
    tl.store(place + HALF, (second * cos + first * sin).to(X.dtype.element_ty), mask=valid)


def rotate_forward(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, rstd: Tensor | None, epsilon: float
) -> None:
    tokens, heads, width = x.shape
    _rotate_forward[(tokens,)](
        x,
        x.stride(0),
        cos,
        sin,
        cos if weight is None else weight,
        cos if rstd is None else rstd,
        heads,
        epsilon,
        NORM=weight is not None,
        HEADS=triton.next_power_of_2(heads),
        HALF=width // 2,
        num_warps=8,
    )


@triton.jit
def _rotate_backward(
    DY,
    dy_stride,
    X,
    x_stride,
    COS,
    SIN,
    WEIGHT,
    RSTD,
    DX,
    dx_stride,
    heads,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    valid = (head < heads)[:, None] & (column < HALF)[None, :]
    inside = head[:, None] * (2 * HALF) + column[None, :]
    cos = tl.load(COS + token * HALF + column)[None, :]
    sin = tl.load(SIN + token * HALF + column)[None, :]
    source = DY + token * dy_stride + inside
    a = tl.load(source, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=valid, other=0.0).to(tl.float32)
    first = a * cos + b * sin
    second = b * cos - a * sin
    if NORM:
        place = X + token * x_stride + inside
        a = tl.load(place, mask=valid, other=0.0).to(tl.float32)
        b = tl.load(place + HALF, mask=valid, other=0.0).to(tl.float32)
        left = tl.load(WEIGHT + column).to(tl.float32)[None, :]
        right = tl.load(WEIGHT + HALF + column).to(tl.float32)[None, :]
        normed_first = (a * cos + b * sin) / left
        normed_second = (b * cos - a * sin) / right
        first = first * left
        second = second * right
        mean = (tl.sum(first * normed_first, 1) + tl.sum(second * normed_second, 1)) / (2 * HALF)
        rstd = tl.load(RSTD + token * heads + head, mask=head < heads, other=0.0)[:, None]
        first = rstd * (first - normed_first * mean[:, None])
        second = rstd * (second - normed_second * mean[:, None])
    target = DX + token * dx_stride + inside
    tl.store(target, first.to(DX.dtype.element_ty), mask=valid)
    tl.store(target + HALF, second.to(DX.dtype.element_ty), mask=valid)


def rotate_backward(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, rstd: Tensor | None, out: Tensor
) -> None:
    tokens, heads, width = grad.shape
    _rotate_backward[(tokens,)](
        grad,
        grad.stride(0),
        x,
        x.stride(0),
        cos,
        sin,
        cos if weight is None else weight,
        cos if rstd is None else rstd,
        out,
        out.stride(0),
        heads,
        NORM=weight is not None,
        HEADS=triton.next_power_of_2(heads),
        HALF=width // 2,
        num_warps=4,
    )


@triton.jit
def _swiglu_forward(GU, gu_stride, OUT, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    gate = tl.load(GU + row * gu_stride + column, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(GU + row * gu_stride + width + column, mask=valid, other=0.0).to(tl.float32)
    tl.store(OUT + row * out_stride + column, (gate * tl.sigmoid(gate) * up).to(OUT.dtype.element_ty), mask=valid)


def swiglu_forward(gate_up: Tensor, out: Tensor) -> None:
    rows, width = out.shape
    block = min(2048, triton.next_power_of_2(width))
    _swiglu_forward[(rows, triton.cdiv(width, block))](
        gate_up, gate_up.stride(0), out, out.stride(0), width, BLOCK=block, num_warps=8
    )


@triton.jit
def _swiglu_backward(GU, gu_stride, DA, da_stride, DGU, dgu_stride, OUT, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    gate = tl.load(GU + row * gu_stride + column, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(GU + row * gu_stride + width + column, mask=valid, other=0.0).to(tl.float32)
    grad = tl.load(DA + row * da_stride + column, mask=valid, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(OUT + row * out_stride + column, (silu * up).to(OUT.dtype.element_ty), mask=valid)
    d_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(DGU + row * dgu_stride + column, d_gate.to(DGU.dtype.element_ty), mask=valid)
    tl.store(DGU + row * dgu_stride + width + column, (grad * silu).to(DGU.dtype.element_ty), mask=valid)


def swiglu_backward(gate_up: Tensor, grad: Tensor, d_gate_up: Tensor, out: Tensor) -> None:
    rows, width = out.shape
    block = min(2048, triton.next_power_of_2(width))
    _swiglu_backward[(rows, triton.cdiv(width, block))](
        gate_up,
        gate_up.stride(0),
        grad,
        grad.stride(0),
        d_gate_up,
        d_gate_up.stride(0),
        out,
        out.stride(0),
        width,
        BLOCK=block,
        num_warps=8,
    )


@triton.jit
def _cross_entropy(LOGITS, stride, TARGETS, LOSSES, WEIGHT, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(TARGETS + row)
    is_target = target >= 0
    weight_per_target = tl.where(is_target, tl.load(WEIGHT), 0.0)
    logits = LOGITS + row * stride
    own = tl.load(logits + target, mask=is_target, other=0.0).to(tl.float32)  # first: it is overwritten below
    highest = -float("inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher))
        highest = higher
    normaliser = highest + tl.log(total)
    tl.store(LOSSES + row, tl.where(is_target, normaliser - own, 0.0))
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < width, other=-float("inf")).to(tl.float32)
        probability = tl.exp(x - normaliser)
        gradient = tl.where(column == target, probability - 1.0, probability) * weight_per_target
        tl.store(logits + column, gradient.to(LOGITS.dtype.element_ty), mask=column < width)


def cross_entropy_in_place(logits: Tensor, targets: Tensor, losses: Tensor, weight_per_target: Tensor) -> None:
    rows, width = logits.shape
    block = min(4096, triton.next_power_of_2(width))
    _cross_entropy[(rows,)](
        logits, logits.stride(0), targets, losses, weight_per_target, width, BLOCK=block, num_warps=8
    )
