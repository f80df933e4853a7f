"""The fast path's kernels and its step on a real GPU; elsewhere these say that they need one.

python -m pytest tests/gpu -s -rs
"""

import pytest
import torch
from tiny import (
    EVERY_LINEAR,
    FAMILY,
    attach_lora,
    config_of,
    documents_of,
    load_base,
    micro_batch,
    random_text,
    write_base,
    write_tokenizer,
)
from transformers import AutoTokenizer

from job.core.recipe import LoraSection
from job.engine import reference
from job.engine.llama import Thrift
from job.tune.model import PackedModel, trainable
from job.tune.paths import AutogradPath, FastPath
from job.tune.selftest import difference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA")

PLAIN = Thrift(kept_layers=0, recomputed_layers=0)
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer", puts_bos=True))
    pairs = [
        (random_text(a, seed=n), random_text(b, seed=50 + n)) for n, (a, b) in enumerate([(5, 3), (40, 60), (1, 1)])
    ]
    return documents_of(folder / "encoded", tokenizer, pairs)


def model_of(tmp_path, architecture, *, dropout=0.0):
    base = write_base(tmp_path / architecture, config_of(architecture))
    lora = LoraSection(r=8, alpha=16, dropout=dropout, targets=EVERY_LINEAR)
    model = PackedModel(attach_lora(load_base(base, device=CUDA), lora, source="tiny", revision=None, seed=0))
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data.normal_(std=0.05)
    return model


def fast(model, thrift=PLAIN, ops=None):
    from job.engine import kernels

    return FastPath(model, ops or kernels, dtype=torch.bfloat16, thrift=thrift)


@pytest.mark.parametrize("architecture", FAMILY)
def test_the_step_agrees_with_autograd(tmp_path, architecture):
    model = model_of(tmp_path, architecture)

    assert difference(model, fast(model), AutogradPath(model, torch.Tensor.backward)) is None


@pytest.mark.parametrize("architecture", FAMILY)
def test_the_kernels_agree_with_the_reference(tmp_path, architecture):
    model = model_of(tmp_path, architecture)

    assert difference(model, fast(model), fast(model, ops=reference)) is None


@pytest.mark.parametrize("thrift", [PLAIN, Thrift(kept_layers=2, recomputed_layers=2)])
def test_the_same_step_gives_the_same_bits(tmp_path, documents, thrift):
    model = model_of(tmp_path, "llama", dropout=0.05)
    model.train()
    batch, results = micro_batch(documents, range(3)).to(CUDA), []
    for each in (PLAIN, thrift):
        path = fast(model, each)
        for parameter in trainable(model):
            parameter.grad = None
        torch.manual_seed(3)
        losses = path.accumulate(batch, targets=batch.targets)
        results.append([losses, *(parameter.grad for parameter in trainable(model))])

    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
