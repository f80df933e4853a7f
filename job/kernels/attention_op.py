"""Attention per document as a fused op with a backward of its own; compilers do not look inside."""

# ruff: noqa: PLR0913, PLR0917 - an op takes tensors and numbers by position

from typing import Any

import torch
from torch import Tensor

from job.kernels.attention import Attention, Segments, has_kernel, has_own_kernel

Gradients = tuple[Tensor, Tensor, Tensor]
"""Gradients of query, key and value."""


@torch.library.custom_op(
    "qlora_job::document_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor lengths, Tensor? blocks, float scale,"
    " int? window, Tensor? sinks=None) -> (Tensor, Tensor)",
)
def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    blocks: Tensor | None,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document.

    Args:
        query: [T, heads, width].
        key: [T, key heads, width].
        value: [T, key heads, width].
        cu_seqlens: [D + 1] int32 on the device: 0, then where each document ends.
        lengths: [D] int64 on the host: tokens of each document. A tensor, because numbers would become part of
            compiled code.
        blocks: from `blocks_of`, for our own kernels; None: torch's.
        scale: of the scores.
        window: how many tokens back a token sees, itself included; None: all.
        sinks: [heads], scores that stand in each row's sum alone; None: there are none. They get no gradient.

    Returns:
        [T, heads, width], and each row's sum, which the backward needs: empty where it needs none.
    """
    return Attention(scale=scale, window=window, sinks=sinks).forward(
        query.contiguous(), key.contiguous(), value.contiguous(), _segments(cu_seqlens, lengths, blocks)
    )


@document_attention.register_fake
def _shapes(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape)
    if not has_own_kernel(query, arguments[4]) and not has_kernel(query):
        return out, query.new_empty(0)
    return out, query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.custom_op(
    "qlora_job::document_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sums,"
    " Tensor cu_seqlens, Tensor lengths, Tensor? blocks, Tensor? sinks, float scale, int? window)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sums: Tensor,
    cu_seqlens: Tensor,
    lengths: Tensor,
    blocks: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
) -> Gradients:
    """Gradients of query, key and value."""
    return Attention(scale=scale, window=window, sinks=sinks).backward(
        grad.contiguous(),
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        out,
        log_sums,
        _segments(cu_seqlens, lengths, blocks),
    )


@_backward_op.register_fake
def _backward_shapes(
    _grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _segments(cu_seqlens: Tensor, lengths: Tensor, blocks: Tensor | None) -> Segments:
    return Segments(cu_seqlens=cu_seqlens, lengths=tuple(lengths.tolist()), blocks=blocks)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, cu_seqlens, lengths, blocks, scale, window, sinks = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens, lengths, blocks, sinks)
    ctx.limits = scale, window


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad, *ctx.saved_tensors, *ctx.limits), None, None, None, None, None, None


document_attention.register_autograd(_backward, setup_context=_keep)
