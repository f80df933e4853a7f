"""What `reference` computes of a mixture's experts, as Triton kernels: no kernel and no look at the device an expert.

Imported only where Triton runs.
"""

# Triton's own language: capitals for pointers and compile-time constants, many arguments by position.
# ruff: noqa: N803, PLR0913, PLR0917, ANN001, ANN202
# ruff: noqa: D103 - documented in `reference`

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from job.core.plan.memory import NF4_BLOCK, NF4_OUTER_BLOCK
from job.kernels.ops import Gate
from job.kernels.weights import QuantisedExperts

_BLOCK, _OUTER = tl.constexpr(NF4_BLOCK), tl.constexpr(NF4_OUTER_BLOCK)
"""NF4's blocks, as compile-time constants."""
_COLUMNS = 1024
"""Of a row, at once."""


@triton.jit
def _dequantise_experts(
    PACKED,
    SCALES,
    SCALES_CODE,
    OUTER_SCALES,
    OFFSETS,
    CODE,
    EXPERT_ROWS,
    OUT,
    blocks,
    outer_blocks,
    ROWS: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    if tl.load(EXPERT_ROWS + expert) > 0:
        block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        valid = block < blocks
        place = expert * blocks + block
        at = tl.load(SCALES + place, mask=valid, other=0).to(tl.int32)
        outer = tl.load(OUTER_SCALES + expert * outer_blocks + block // _OUTER, mask=valid, other=0.0)
        scale = tl.load(SCALES_CODE + at, mask=valid, other=0.0) * outer + tl.load(OFFSETS + expert)
        pairs = tl.load(
            PACKED + place[:, None] * (_BLOCK // 2) + tl.arange(0, _BLOCK // 2)[None, :], mask=valid[:, None], other=0
        ).to(tl.int32)
        first = tl.load(CODE + (pairs >> 4)) * scale[:, None]
        second = tl.load(CODE + (pairs & 15)) * scale[:, None]
        values = tl.interleave(first, second).to(OUT.dtype.element_ty)
        tl.store(OUT + place[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :], values, mask=valid[:, None])


def dequantise_experts(weights: QuantisedExperts, rows: Tensor, out: Tensor) -> None:
    blocks, per_program = weights.scales.shape[1], 32
    _dequantise_experts[(triton.cdiv(blocks, per_program), len(weights))](
        weights.packed,
        weights.scales,
        weights.scales_code,
        weights.outer_scales,
        weights.offsets,
        weights.code,
        rows,
        out,
        blocks,
        weights.outer_scales.shape[1],
        ROWS=per_program,
        num_warps=4,
    )


@triton.jit
def _parts(Z, row, stride, column, width, valid, INTERLEAVED: tl.constexpr):
    base = Z + row * stride
    if INTERLEAVED:
        gates, ups = base + 2 * column, base + 2 * column + 1
    else:
        gates, ups = base + column, base + width + column
    gate = tl.load(gates, mask=valid, other=0.0).to(tl.float32)
    return gate, tl.load(ups, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _gate_forward(
    Z,
    z_stride,
    OUT,
    out_stride,
    width,
    alpha,
    limit,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    ONE_MORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        valid = column < width
        gate, up = _parts(Z, row, z_stride, column, width, valid, INTERLEAVED)
        if LIMITED:
            gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
        if ONE_MORE:
            up += 1.0
        result = up * gate * tl.sigmoid(alpha * gate)
        tl.store(OUT + row * out_stride + column, result.to(OUT.dtype.element_ty), mask=valid)


def gate_forward(z: Tensor, gate: Gate, out: Tensor) -> None:
    if len(out):
        _gate_forward[(len(out),)](z, z.stride(0), out, out.stride(0), out.shape[1], *_scalars(gate), **_kind(gate))


def _scalars(gate: Gate) -> tuple[float, float]:
    return gate.alpha, 0.0 if gate.limit is None else gate.limit


def _kind(gate: Gate) -> dict[str, int]:
    return {
        "INTERLEAVED": gate.interleaved,
        "LIMITED": gate.limit is not None,
        "ONE_MORE": gate.one_more,
        "BLOCK": _COLUMNS,
        "num_warps": 4,
    }


@triton.jit
def _gate_backward(
    Z,
    z_stride,
    GRAD,
    grad_stride,
    WEIGHTS,
    DZ,
    dz_stride,
    OUT,
    out_stride,
    SHARES,
    width,
    alpha,
    limit,
    INTERLEAVED: tl.constexpr,
    LIMITED: tl.constexpr,
    ONE_MORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(WEIGHTS + row).to(tl.float32)
    share = 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        valid = column < width
        gate, up = _parts(Z, row, z_stride, column, width, valid, INTERLEAVED)
        grad = tl.load(GRAD + row * grad_stride + column, mask=valid, other=0.0).to(tl.float32)
        d_gate, d_up = grad * weight, grad * weight
        if LIMITED:
            d_gate = tl.where(gate <= limit, d_gate, 0.0)
            d_up = tl.where(tl.abs(up) <= limit, d_up, 0.0)
            gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
        if ONE_MORE:
            up += 1.0
        sigmoid = tl.sigmoid(alpha * gate)
        swish = gate * sigmoid
        result = swish * up
        share += tl.sum(result * grad)
        tl.store(OUT + row * out_stride + column, result.to(OUT.dtype.element_ty), mask=valid)
        d_gate *= up * (sigmoid + alpha * swish * (1 - sigmoid))
        d_up *= swish
        base = DZ + row * dz_stride
        if INTERLEAVED:
            gates, ups = base + 2 * column, base + 2 * column + 1
        else:
            gates, ups = base + column, base + width + column
        tl.store(gates, d_gate.to(DZ.dtype.element_ty), mask=valid)
        tl.store(ups, d_up.to(DZ.dtype.element_ty), mask=valid)
    tl.store(SHARES + row, share)


def gate_backward(
    z: Tensor, grad: Tensor, row_weights: Tensor, gate: Gate, d_z: Tensor, out: Tensor, shares: Tensor
) -> None:
    if len(out):
        _gate_backward[(len(out),)](
            z,
            z.stride(0),
            grad,
            grad.stride(0),
            row_weights,
            d_z,
            d_z.stride(0),
            out,
            out.stride(0),
            shares,
            out.shape[1],
            *_scalars(gate),
            **_kind(gate),
        )


@triton.jit
def _combine_rows(
    ROWS, stride, PLACES, WEIGHTS, OUT, out_stride, width, chosen, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for each in range(chosen):
        place = tl.load(PLACES + token * chosen + each)
        value = tl.load(ROWS + place * stride + column, mask=valid, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(WEIGHTS + token * chosen + each).to(tl.float32)
        total += value
    tl.store(OUT + token * out_stride + column, total.to(OUT.dtype.element_ty), mask=valid)


def combine_rows(rows: Tensor, places: Tensor, weights: Tensor | None, out: Tensor) -> None:
    tokens, width = out.shape
    if tokens:
        _combine_rows[(tokens, triton.cdiv(width, _COLUMNS))](
            rows,
            rows.stride(0),
            places,
            places if weights is None else weights.contiguous(),
            out,
            out.stride(0),
            width,
            places.shape[1],
            WEIGHTED=weights is not None,
            BLOCK=_COLUMNS,
            num_warps=4,
        )


@triton.jit
def _sums_by_expert(
    LEFT,
    left_stride,
    RIGHT,
    right_stride,
    ENDS,
    OUT,
    n,
    k,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    expert = tl.program_id(0).to(tl.int64)
    before = tl.load(ENDS + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ENDS + expert)
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(before, end, BLOCK_S):
        row = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        there = (row < end)[:, None]
        left = tl.load(LEFT + row[:, None] * left_stride + i[None, :], mask=there & (i < n)[None, :], other=0.0)
        right = tl.load(RIGHT + row[:, None] * right_stride + j[None, :], mask=there & (j < k)[None, :], other=0.0)
        if EXACT:
            total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
        else:
            total = tl.dot(tl.trans(left), right, total)
    place = OUT + expert * n * k + i[:, None] * k + j[None, :]
    tl.store(place, total, mask=(i < n)[:, None] & (j < k)[None, :])


def sums_by_expert(left: Tensor, right: Tensor, ends: Tensor, out: Tensor) -> None:
    experts, n, k = out.shape
    block_n, block_k = (max(16, min(64, triton.next_power_of_2(side))) for side in (n, k))
    _sums_by_expert[(experts, triton.cdiv(n, block_n), triton.cdiv(k, block_k))](
        left,
        left.stride(0),
        right,
        right.stride(0),
        ends,
        out,
        n,
        k,
        EXACT=left.dtype == torch.float32,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_S=64,
        num_warps=4,
    )
