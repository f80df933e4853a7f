"""Fixtures of the tune room."""

import sys

import pytest
import torch
from tiny import ARCHITECTURES, adapted, targets_of
from tiny_fixtures import bases, documents, plain_tokenizer, start, tied_base, tokenizer  # noqa: F401 - fixtures

import job.kernels
from job.core.recipe.schema import LoraSection
from job.kernels.attention import Attention, Segments
from job.kernels.blocks import BLOCK


class OwnKernels:
    """In place of our own attention kernels, which need a GPU: the formula, for the documents that blocks are of."""

    def __init__(self):
        self.calls = 0

    def forward(self, query, key, value, blocks, scale, window, sinks):
        self.calls += 1
        self.sinks = sinks
        of = Attention(scale=scale, window=window, sinks=sinks)
        out, _ = of.forward(query, key, value, _segments_in(blocks))
        return out, torch.zeros(query.shape[1], len(query))

    def backward(self, grad, *given):
        query, key, value, out, _log_sums, blocks, scale, window, room = given
        # A kernel knows no sinks in its backward: they are in the row sums that its forward keeps.
        of = Attention(scale=scale, window=window, sinks=self.sinks)
        grads = of.backward(grad, query, key, value, out, None, _segments_in(blocks))
        for place, gradient in zip(room, grads, strict=True):
            place.copy_(gradient)


def _segments_in(blocks):
    there = [(start, first, end) for start, first, end in blocks.tolist() if first < end]
    spans = sorted({(start, end) for start, _first, end in there})
    assert there == [(start, first, end) for start, end in spans for first in range(start, end, BLOCK)]
    lengths = tuple(end - start for start, end in spans)
    return Segments(cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), lengths=lengths)


@pytest.fixture
def own_kernels(monkeypatch):
    """They are called wherever a model's attention is our own."""
    kernels = OwnKernels()
    monkeypatch.setattr(job.kernels, "triton_attention", kernels, raising=False)
    monkeypatch.setitem(sys.modules, "job.kernels.triton_attention", kernels)
    return kernels


@pytest.fixture(scope="session", params=ARCHITECTURES)
def any_model(request, bases):
    """Each architecture in fp32 with an adapter that already does something. Tests leave it as it was."""
    lora = LoraSection(r=8, alpha=16, targets=targets_of(request.param))
    return adapted(bases[request.param], lora, moved=True)


@pytest.fixture(scope="session")
def llama(bases):
    """As any_model, Llama alone."""
    return adapted(bases["llama"], LoraSection(r=8, alpha=16, targets=("q_proj", "v_proj", "lm_head")), moved=True)
