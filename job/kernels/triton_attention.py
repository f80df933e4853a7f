"""Causal attention inside each document as Triton kernels of our own, made for many short documents.

A block of queries belongs to one document, so that nothing is computed for its neighbours; each gradient is summed by
one program, in a fixed order and without atomics. Imported only where Triton runs. FlashAttention-2: Dao 2023, arXiv
2307.08691, algorithms 1 and 2.
"""

# Triton's own language: capitals for pointers and compile-time constants, many arguments by position.
# ruff: noqa: N803, PLR0913, PLR0917, ANN001, ANN202

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import torch
import triton
import triton.language as tl
from torch import Tensor

from job.kernels.blocks import BLOCK

_LOG2_E = 1.4426950408889634
_FORWARD = {"num_warps": 4, "num_stages": 3}
_BACKWARD = {"num_warps": 4, "num_stages": 2}
"""The fastest of the variants tried on an H100 (32 to 128 queries a block, 2 to 8 warps, 1 to 3 stages)."""


@triton.jit
def _block(BLOCKS):
    """This program's block: start of its document, start of the block, end of the document."""
    at = BLOCKS + tl.program_id(0) * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _rows(X, row, end, stride, head, WIDTH: tl.constexpr):
    """Tokens of one head: [rows, WIDTH], zero from `end` on."""
    place = X + row[:, None].to(tl.int64) * stride + head * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(place, mask=row[:, None] < end, other=0.0)


@triton.jit
def _put(X, values, row, end, stride, head, WIDTH: tl.constexpr):
    place = X + row[:, None].to(tl.int64) * stride + head * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(place, values.to(X.dtype.element_ty), mask=row[:, None] < end)


@triton.jit
def _sees(query, key, window, WINDOWED: tl.constexpr):
    """Whether a token sees another one of its document."""
    sees = key <= query
    if WINDOWED:
        sees = sees & (key > query - window)
    return sees


@triton.jit
def _first_key(start, first, window, SIZE: tl.constexpr, WINDOWED: tl.constexpr):
    """First key that a block of queries reads: the document's start or, with a window, whole blocks after it."""
    if WINDOWED:
        start += tl.maximum(first - window + 1 - start, 0) // SIZE * SIZE
    return start


@triton.jit
def _attention_forward(
    Q,
    K,
    V,
    OUT,
    LOG_SUMS,
    BLOCKS,
    SINKS,
    q_stride,
    k_stride,
    v_stride,
    tokens,
    scale,
    window,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
    SUNK: tl.constexpr,
):
    start, first, end = _block(BLOCKS)
    head = tl.program_id(1)
    if first >= end:
        return
    own = first + tl.arange(0, SIZE)
    q = _rows(Q, own, end, q_stride, head, WIDTH)
    most = tl.full([SIZE], float("-inf"), tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    if SUNK:  # each row's sum begins with the sink's weight, as the highest score so far
        most = tl.full([SIZE], 0.0, tl.float32) + tl.load(SINKS + head)
        total = tl.full([SIZE], 1.0, tl.float32)
    result = tl.zeros([SIZE, WIDTH], tl.float32)
    for key in range(_first_key(start, first, window, SIZE, WINDOWED), first + 1, SIZE):
        other = key + tl.arange(0, SIZE)
        k = _rows(K, other, end, k_stride, head // GROUP, WIDTH)
        v = _rows(V, other, end, v_stride, head // GROUP, WIDTH)
        scores = tl.dot(q, tl.trans(k)) * scale
        scores = tl.where(_sees(own[:, None], other[None, :], window, WINDOWED), scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # nothing is seen yet
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(most - safe)
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, result * shrink[:, None])
        most = higher
    _put(OUT, result / total[:, None], own, end, tl.num_programs(1) * WIDTH, head, WIDTH)
    tl.store(LOG_SUMS + head * tokens + own, most + tl.log2(total), mask=own < end)


@triton.jit
def _attention_row_sums(OUT, GRAD, SUMS, grad_stride, tokens, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Row sums of the result times its gradient, for each head."""
    row, head = tl.program_id(0) * SIZE + tl.arange(0, SIZE), tl.program_id(1)
    out = _rows(OUT, row, tokens, tl.num_programs(1) * WIDTH, head, WIDTH).to(tl.float32)
    grad = _rows(GRAD, row, tokens, grad_stride, head, WIDTH).to(tl.float32)
    tl.store(SUMS + head * tokens + row, tl.sum(out * grad, 1), mask=row < tokens)


@triton.jit
def _attention_backward(
    Q,
    K,
    V,
    GRAD,
    LOG_SUMS,
    SUMS,
    DQ,
    DK,
    DV,
    BLOCKS,
    q_stride,
    k_stride,
    v_stride,
    grad_stride,
    dq_stride,
    dk_stride,
    dv_stride,
    tokens,
    scale,
    exact_scale,
    window,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Gradients of one block: of keys and values from the queries after them, then of queries from the keys before.

    The first part is the longer the earlier the block, the second the later: all programs of a document do equal work.
    """
    start, first, end = _block(BLOCKS)
    key_head = tl.program_id(1)
    if first >= end:
        return
    own = first + tl.arange(0, SIZE)
    k = _rows(K, own, end, k_stride, key_head, WIDTH)
    v = _rows(V, own, end, v_stride, key_head, WIDTH)
    d_k = tl.zeros([SIZE, WIDTH], tl.float32)
    d_v = tl.zeros([SIZE, WIDTH], tl.float32)
    last = end
    if WINDOWED:
        last = tl.minimum(end, first + SIZE + window - 1)
    for member in range(GROUP):
        head = key_head * GROUP + member
        for query in range(first, last, SIZE):
            other = query + tl.arange(0, SIZE)
            q = _rows(Q, other, end, q_stride, head, WIDTH)
            grad = _rows(GRAD, other, end, grad_stride, head, WIDTH)
            log_sum = tl.load(LOG_SUMS + head * tokens + other, mask=other < end, other=0.0)
            row_sum = tl.load(SUMS + head * tokens + other, mask=other < end, other=0.0)
            scores = tl.dot(k, tl.trans(q)) * scale
            sees = _sees(other[None, :], own[:, None], window, WINDOWED)
            weights = tl.where(sees, tl.exp2(scores - log_sum[None, :]), 0.0)
            d_v = tl.dot(weights.to(grad.dtype), grad, d_v)
            d_scores = weights * (tl.dot(v, tl.trans(grad)) - row_sum[None, :])
            d_k = tl.dot(d_scores.to(q.dtype), q, d_k)
    _put(DK, d_k * exact_scale, own, end, dk_stride, key_head, WIDTH)
    _put(DV, d_v, own, end, dv_stride, key_head, WIDTH)
    low = _first_key(start, first, window, SIZE, WINDOWED)
    for member in range(GROUP):
        head = key_head * GROUP + member
        q = _rows(Q, own, end, q_stride, head, WIDTH)
        grad = _rows(GRAD, own, end, grad_stride, head, WIDTH)
        log_sum = tl.load(LOG_SUMS + head * tokens + own, mask=own < end, other=0.0)
        row_sum = tl.load(SUMS + head * tokens + own, mask=own < end, other=0.0)
        d_q = tl.zeros([SIZE, WIDTH], tl.float32)
        for key in range(low, first + 1, SIZE):
            other = key + tl.arange(0, SIZE)
            other_k = _rows(K, other, end, k_stride, key_head, WIDTH)
            other_v = _rows(V, other, end, v_stride, key_head, WIDTH)
            scores = tl.dot(q, tl.trans(other_k)) * scale
            sees = _sees(own[:, None], other[None, :], window, WINDOWED)
            weights = tl.where(sees, tl.exp2(scores - log_sum[:, None]), 0.0)
            d_scores = weights * (tl.dot(grad, tl.trans(other_v)) - row_sum[:, None])
            d_q = tl.dot(d_scores.to(q.dtype), other_k, d_q)
        _put(DQ, d_q * exact_scale, own, end, dq_stride, head, WIDTH)


def forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, scale: float, window: int | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention, and the log sums that its backward needs.

    Args:
        q: [T, heads, width]; a token's heads are contiguous, tokens may lie apart.
        k: [T, key heads, width].
        v: [T, key heads, width].
        blocks: from `blocks_of`.
        scale: of the scores.
        window: how many tokens back a token sees, itself included; None: all.
        sinks: [heads], scores that stand in each row's sum alone; None: there are none.

    Returns:
        [T, heads, width], and the binary logarithm of each query's sum of weights, [heads, T] fp32.
    """
    tokens, heads, width = q.shape
    out = q.new_empty(tokens, heads, width)
    log_sums = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    _attention_forward[(len(blocks), heads)](
        q,
        k,
        v,
        out,
        log_sums,
        blocks,
        log_sums if sinks is None else sinks.float() * _LOG2_E,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        tokens,
        scale * _LOG2_E,
        window or 0,
        GROUP=heads // k.shape[1],
        WIDTH=width,
        SIZE=BLOCK,
        WINDOWED=window is not None,
        SUNK=sinks is not None,
        **_FORWARD,
    )
    return out, log_sums


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    blocks: Tensor,
    scale: float,
    window: int | None,
    room: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Gradients of query, key and value, written into `room`: tensors of their shapes whose tokens may lie apart."""
    tokens, heads, width = q.shape
    key_heads = k.shape[1]
    sums = torch.empty_like(log_sums)
    rows = 32
    _attention_row_sums[(triton.cdiv(tokens, rows), heads)](
        out, grad, sums, grad.stride(0), tokens, WIDTH=width, SIZE=rows, num_warps=4
    )
    d_q, d_k, d_v = room
    _attention_backward[(len(blocks), key_heads)](
        q,
        k,
        v,
        grad,
        log_sums,
        sums,
        d_q,
        d_k,
        d_v,
        blocks,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        grad.stride(0),
        d_q.stride(0),
        d_k.stride(0),
        d_v.stride(0),
        tokens,
        scale * _LOG2_E,
        scale,
        window or 0,
        GROUP=heads // key_heads,
        WIDTH=width,
        SIZE=BLOCK,
        WINDOWED=window is not None,
        **_BACKWARD,
    )
