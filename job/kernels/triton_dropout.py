"""Thin products through dropout masks as Triton kernels: a mask is recomputed wherever it is needed, never stored."""

# As in `triton_elementwise`.
# ruff: noqa: N803, PLR0913, PLR0917, ANN001, ANN202, D103
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from job.kernels.ops import Masks
from job.kernels.reference import MASK_STEPS


@triton.jit
def _mixed(word):
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _kept(SEED, number, place, threshold):
    """As `reference.kept`, in 32-bit words."""
    seed = tl.load(SEED).to(tl.uint32)
    first = _mixed(seed + number.to(tl.uint32) * 0x9E3779B9)
    second = _mixed(first ^ 0x85EBCA6B)
    word = (place ^ first) * 0x9E3779B1
    word = (word ^ (word >> 15) ^ second) * 0x846CA68B
    return (word >> 16) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["number", "threshold", "rows"])
def _masked_ranks(
    X,
    x_stride,
    A,
    a_stride,
    OUT,
    out_stride,
    SEED,
    number,
    threshold,
    scale,
    rows,
    width,
    rank,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    adapter = tl.program_id(0)  # neighbouring programs read the same rows
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    source = X + row.to(tl.int64)[:, None] * x_stride
    ranks = tl.arange(0, RANKS)
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        valid = (row < rows)[:, None] & (column < width)[None, :]
        x = tl.load(source + column[None, :], mask=valid, other=0.0)
        place = (row[:, None] * width + column[None, :]).to(tl.uint32)
        x = tl.where(_kept(SEED, number + adapter, place, threshold), x, 0.0).to(X.dtype.element_ty)
        a = tl.load(
            A + (adapter * rank + ranks)[:, None] * a_stride + column[None, :],
            mask=(ranks < rank)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        total = tl.dot(x, tl.trans(a), total, input_precision="ieee")
    place = OUT + row.to(tl.int64)[:, None] * out_stride + (adapter * rank + ranks)[None, :]
    valid = (row < rows)[:, None] & (ranks < rank)[None, :]
    tl.store(place, (total * scale).to(OUT.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["number", "threshold", "rows"])
def _masked_gradient(
    THIN,
    thin_stride,
    X,
    x_stride,
    OUT,
    SEED,
    number,
    threshold,
    scale,
    rows,
    width,
    rank,
    share,
    ADAPTERS: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    adapter = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    ranks = tl.arange(0, RANKS)
    total = tl.zeros((RANKS, COLUMNS), dtype=tl.float32)
    for start in range(0, share, ROWS):
        row = part * share + start + tl.arange(0, ROWS)
        valid = row < tl.minimum((part + 1) * share, rows)
        far = row.to(tl.int64)[:, None]
        x = tl.load(X + far * x_stride + column[None, :], mask=valid[:, None] & (column < width)[None, :], other=0.0)
        place = (row[:, None] * width + column[None, :]).to(tl.uint32)
        x = tl.where(_kept(SEED, number + adapter, place, threshold), x, 0.0).to(X.dtype.element_ty)
        thin = tl.load(
            THIN + far * thin_stride + (adapter * rank + ranks)[None, :],
            mask=valid[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(thin), x, total, input_precision="ieee")
    place = OUT + ((part * ADAPTERS + adapter) * rank + ranks)[:, None] * width + column[None, :]
    tl.store(place, total * scale, mask=(ranks < rank)[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=["number", "threshold", "rows"])
def _masked_add(
    THIN,
    thin_stride,
    A,
    a_stride,
    INTO,
    into_stride,
    SEED,
    number,
    threshold,
    scale,
    rows,
    width,
    rank,
    ADAPTERS: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    far = row.to(tl.int64)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANKS)
    valid = (row < rows)[:, None] & (column < width)[None, :]
    place = (row[:, None] * width + column[None, :]).to(tl.uint32)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for adapter in tl.static_range(ADAPTERS):
        thin = tl.load(
            THIN + far * thin_stride + (adapter * rank + ranks)[None, :],
            mask=(row < rows)[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        a = tl.load(
            A + (adapter * rank + ranks)[:, None] * a_stride + column[None, :],
            mask=(ranks < rank)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        kept = _kept(SEED, number + adapter, place, threshold)
        total += tl.where(kept, tl.dot(thin, a, input_precision="ieee"), 0.0)
    into = INTO + far * into_stride + column[None, :]
    value = tl.load(into, mask=valid, other=0.0).to(tl.float32) + total * scale
    tl.store(into, value.to(INTO.dtype.element_ty), mask=valid)


_PROGRAMS = 512
"""Programs that keep any GPU busy."""
_FEW_ROWS = 2048
"""Rows up to which a program takes fewer of them at once."""


def _facts(masks: Masks) -> tuple[Tensor, int, int, float]:
    return masks.seed, 8 * masks.site, round(masks.rate * MASK_STEPS), 1 / (1 - masks.rate)


def _block(rank: int) -> int:
    """Ranks rounded up to what tensor cores take."""
    return max(16, int(triton.next_power_of_2(rank)))


def _rows_at_once(rows: int) -> int:
    return 16 if rows <= _FEW_ROWS else 64


def masked_ranks(x: Tensor, a: Tensor, out: Tensor, masks: Masks) -> None:
    rows, width = x.shape
    rank, at_once = len(a) // masks.adapters, _rows_at_once(rows)
    _masked_ranks[(masks.adapters, triton.cdiv(rows, at_once))](
        x,
        x.stride(0),
        a,
        a.stride(0),
        out,
        out.stride(0),
        *_facts(masks),
        rows,
        width,
        rank,
        RANKS=_block(rank),
        ROWS=at_once,
        COLUMNS=128,
        num_warps=4,
        num_stages=3,
    )


def masked_gradient(thin: Tensor, x: Tensor, masks: Masks) -> Tensor:
    rows, width = x.shape
    ranks, columns = thin.shape[1], triton.cdiv(width, 128)
    if not rows:
        return torch.zeros(ranks, width, dtype=torch.float32, device=x.device)
    share = -(-triton.cdiv(rows, max(1, _PROGRAMS // columns)) // 64) * 64
    parts = triton.cdiv(rows, share)
    out = torch.empty(parts, ranks, width, dtype=torch.float32, device=x.device)
    _masked_gradient[(masks.adapters, columns, parts)](
        thin,
        thin.stride(0),
        x,
        x.stride(0),
        out,
        *_facts(masks),
        rows,
        width,
        ranks // masks.adapters,
        share,
        ADAPTERS=masks.adapters,
        RANKS=_block(ranks // masks.adapters),
        ROWS=64,
        COLUMNS=128,
        num_warps=4,
        num_stages=3,
    )
    return out.sum(dim=0)


def masked_add(thin: Tensor, a: Tensor, into: Tensor, masks: Masks) -> None:
    rows, width = into.shape
    rank, at_once = len(a) // masks.adapters, _rows_at_once(rows)
    _masked_add[(triton.cdiv(rows, at_once), triton.cdiv(width, 128))](
        thin,
        thin.stride(0),
        a,
        a.stride(0),
        into,
        into.stride(0),
        *_facts(masks),
        rows,
        width,
        rank,
        ADAPTERS=masks.adapters,
        RANKS=_block(rank),
        ROWS=at_once,
        COLUMNS=128,
        num_warps=4,
    )
