"""Attention per document as a fused op: its values and gradients are those of each document by itself, in fp32."""

import pytest
import torch
from torch.library import opcheck

from job.kernels import attention_op
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


def by_the_formula(query, key, value, window):
    """softmax(scale q k^T) v over what a token sees: one document, written out."""
    groups = HEADS // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = SCALE * torch.einsum("qhw,khw->hqk", query, key)
    tokens = range(len(query))
    hidden = [[not 0 <= q - k < (window or len(query)) for k in tokens] for q in tokens]
    weights = scores.masked_fill(torch.tensor(hidden), float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khw->qhw", weights, value)


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_each_document_has_the_attention_that_it_has_alone(key_heads, window):
    parts, cu_seqlens, lengths = inputs(key_heads)
    alone = zip(*(torch.split(part, LENGTHS) for part in parts), strict=True)
    expected = torch.cat([by_the_formula(*each, window) for each in alone])
    found = document_attention(*parts, cu_seqlens, lengths, None, SCALE, window)[0]
    grad = torch.randn_like(expected)

    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected, parts, grad)
    for gradient, other in zip(torch.autograd.grad(found, parts, grad), wanted, strict=True):
        torch.testing.assert_close(gradient, other)


def test_forward_and_backward_pass_torch_s_opcheck():
    parts, cu_seqlens, lengths = inputs(2)
    limits = (cu_seqlens, lengths, None, SCALE, 3)
    opcheck(document_attention, (*parts, *limits))

    parts = [part.detach() for part in parts]
    out, *kept = document_attention(*parts, *limits)
    opcheck(attention_op._backward_op, (out, *parts, out, *kept, *limits))


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
