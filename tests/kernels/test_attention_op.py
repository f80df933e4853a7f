"""Attention per document as a fused op: its values and gradients are those of each document by itself, in fp32."""

import pytest
import torch
from torch.library import opcheck

from job.kernels import attention_op
from job.kernels.attention import _with_sinks, visible
from job.kernels.attention_op import document_attention
from job.kernels.blocks import BLOCK, blocks_of

LENGTHS, HEADS, WIDTH = (5, 1, 9), 4, 8
SCALE = 0.3


def inputs(key_heads):
    torch.manual_seed(0)
    heads = (HEADS, key_heads, key_heads)
    parts = [torch.randn(sum(LENGTHS), number, WIDTH, requires_grad=True) for number in heads]
    lengths = torch.tensor(LENGTHS)
    return parts, torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32), lengths


SINKS = torch.tensor([-30.0, -1.0, 0.5, 8.0])
"""From one that leaves a row as it is to one that takes most of it."""


def by_the_formula(query, key, value, window, sinks=None):
    """softmax(scale q k^T) v over what a token sees, a sink in the sum beside: one document, written out."""
    groups = HEADS // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = SCALE * torch.einsum("qhw,khw->hqk", query, key)
    tokens = range(len(query))
    hidden = [[not 0 <= q - k < (window or len(query)) for k in tokens] for q in tokens]
    weights = scores.masked_fill(torch.tensor(hidden), float("-inf")).exp()
    beside = 0 if sinks is None else sinks.exp()[:, None, None]
    return torch.einsum("hqk,khw->qhw", weights / (weights.sum(dim=-1, keepdim=True) + beside), value)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_each_document_has_the_attention_that_it_has_alone(key_heads, window, sinks):
    parts, cu_seqlens, lengths = inputs(key_heads)
    alone = zip(*(torch.split(part, LENGTHS) for part in parts), strict=True)
    expected = torch.cat([by_the_formula(*each, window, sinks) for each in alone])
    found = document_attention(*parts, cu_seqlens, lengths, None, SCALE, window, sinks)[0]
    grad = torch.randn_like(expected)

    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, parts, grad)
    for gradient, other in zip(torch.autograd.grad(found, parts, grad), wanted, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no sinks", "sinks"])
def test_forward_and_backward_pass_torch_s_opcheck(sinks):
    parts, cu_seqlens, lengths = inputs(2)
    limits = (cu_seqlens, lengths, None, SCALE, 3)
    opcheck(document_attention, (*parts, *limits, sinks))

    parts = [part.detach() for part in parts]
    out, *kept = document_attention(*parts, *limits, sinks)
    opcheck(attention_op._backward_op, (out, *parts, out, *kept, cu_seqlens, lengths, None, sinks, SCALE, 3))


@pytest.mark.parametrize("window", [None, 3])
def test_attention_without_sinks_becomes_attention_with_them_by_its_rows_sums(window):
    """What is done where a kernel knows no sinks: its result and log-sum-exp, made over, go into its own backward."""
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(9, HEADS, WIDTH, dtype=torch.float64) for _ in range(4))
    query, key, value = (part.requires_grad_() for part in (query, key, value))
    scores = SCALE * torch.einsum("qhw,khw->hqk", query, key)
    scores = scores.masked_fill(~visible(9, window, torch.device("cpu")), float("-inf"))
    plain = torch.einsum("hqk,khw->qhw", scores.softmax(dim=-1), value)
    out, log_sums = _with_sinks(plain, scores.logsumexp(dim=-1), SINKS)
    expected = by_the_formula(query, key, value, window, SINKS.double())
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)

    # A kernel's backward (FlashAttention-2, arXiv 2307.08691, algorithm 2), from those two.
    weights = torch.exp(scores - log_sums[..., None])
    d_scores = weights * (torch.einsum("qhw,khw->hqk", grad, value) - (grad * out).sum(dim=-1).t()[..., None])
    found = (
        SCALE * torch.einsum("hqk,khw->qhw", d_scores, key),
        SCALE * torch.einsum("hqk,qhw->khw", d_scores, query),
        torch.einsum("hqk,qhw->khw", weights, grad),
    )
    wanted = torch.autograd.grad(expected, [query, key, value], grad)
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_of_one_document_each_and_hold_every_token_once(seed):
    """As many as any documents could need: of one token each, of none, or of whole blocks and one token."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.tensor([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 1])
    lengths = kinds[torch.randint(0, len(kinds), (40,), generator=generator)]
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    blocks = blocks_of(cu_seqlens, int(cu_seqlens[-1])).tolist()

    starts, ends = cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()
    expected = [[s, first, e] for s, e in zip(starts, ends, strict=True) for first in range(s, e, BLOCK)]
    assert [block for block in blocks if block[1] < block[2]] == expected
