"""Fixtures of the tune room: tiny bases of five architectures, a readable tokenizer, made once a session."""

import sys

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    adapted,
    attempt,
    config_of,
    documents_of,
    random_text,
    targets_of,
    write_base,
    write_tokenizer,
)

import job.kernels
from job.core.recipe import LoraSection
from job.kernels.attention import Attention, Segments
from job.kernels.blocks import BLOCK
from job.tune.model.config import load_tokenizer


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Architecture -> folder."""
    root = tmp_path_factory.mktemp("bases")
    return {name: write_base(root / name, config_of(name)) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("tied") / "llama", config_of("llama", tied=True))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Puts <s> before a text, as Llama's does."""
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), puts_bos=True))


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory):
    """Puts nothing before a text, as GPT-NeoX's does."""
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("plain"), puts_bos=False))


@pytest.fixture(scope="session")
def documents(tmp_path_factory, tokenizer):
    """Eight documents of 12 to 40 tokens; the targets are between a twentieth and nearly all of them."""
    sizes = [(9, 2), (3, 30), (20, 3), (2, 12), (14, 14), (4, 33), (30, 1), (6, 20)]
    pairs = [(random_text(p, seed=i), random_text(c, seed=100 + i)) for i, (p, c) in enumerate(sizes)]
    return documents_of(tmp_path_factory.mktemp("documents"), tokenizer, pairs)


class OwnKernels:
    """For the engine's own attention kernels, which need a GPU: the formula, for the documents that blocks are of."""

    def __init__(self):
        self.calls = 0

    def forward(self, query, key, value, blocks, scale, window):
        self.calls += 1
        out, _ = Attention(scale=scale, window=window).forward(query, key, value, _segments_in(blocks))
        return out, torch.zeros(query.shape[1], len(query))

    def backward(self, grad, *given):
        query, key, value, out, _log_sums, blocks, scale, window, room = given
        of = Attention(scale=scale, window=window)
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
    """They are asked wherever a model's attention is the engine's own."""
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


@pytest.fixture
def start(bases, documents, tmp_path):
    """Prepare an attempt at training on the tiny documents."""

    def prepare(architecture="llama", *, lora=None, base=None, **options):
        lora = lora or LoraSection(r=8, alpha=16, targets=targets_of(architecture))
        return attempt(
            base or bases[architecture],
            options.pop("documents", documents),
            folder=tmp_path / "trackers",
            lora=lora,
            **options,
        )

    return prepare
