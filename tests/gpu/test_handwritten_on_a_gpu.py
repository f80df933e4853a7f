"""The fast engine's kernels and its step on a real GPU; elsewhere these are skipped.

python -m pytest tests/gpu -s -rs
"""

import pytest
import torch
from tiny import (
    EVERY_LINEAR,
    FAMILY,
    attach_lora,
    config_of,
    cut_of,
    documents_of,
    load_base,
    micro_batch,
    random_text,
    write_base,
    write_tokenizer,
)
from transformers import AutoTokenizer

from job.core.recipe.schema import LoraSection
from job.kernels import reference
from job.kernels.attention import OWN_WIDTHS, Attention, Segments
from job.kernels.blocks import blocks_of
from job.kernels.decoder import Saving
from job.kernels.ops import Masks
from job.tune.engines.attention_choice import AttentionChoice, difference_from_formula
from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.choice import choose_engine
from job.tune.engines.handwritten import HandwrittenEngine
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import difference
from job.tune.loop.flat import FlatAdapter
from job.tune.model.adapter import trainable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA")

PLAIN = Saving(kept_layers=0, recomputed_layers=0)
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
    model = PackedModel(
        attach_lora(load_base(base, device=CUDA, dtype=torch.bfloat16), lora, source="tiny", revision=None, seed=0)
    )
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data.normal_(std=0.05)
    return model


def fast(model, saving=PLAIN, ops=None, *, own_attention=True):
    from job.kernels import triton_elementwise as kernels

    model.attention = AttentionChoice(own=own_attention, reason=None)
    return HandwrittenEngine(model, ops or kernels, dtype=torch.bfloat16, saving=saving)


@pytest.mark.parametrize("own_attention", [False, True])
@pytest.mark.parametrize("architecture", FAMILY)
def test_the_step_agrees_with_autograd(tmp_path, architecture, own_attention):
    model = model_of(tmp_path, architecture)
    engine = fast(model, own_attention=own_attention)

    assert difference(model, engine, AutogradEngine(model, torch.Tensor.backward)) is None


@pytest.mark.parametrize("architecture", FAMILY)
def test_the_kernels_agree_with_the_reference(tmp_path, architecture):
    model = model_of(tmp_path, architecture)

    assert difference(model, fast(model), fast(model, ops=reference)) is None


@pytest.mark.parametrize("saving", [PLAIN, Saving(kept_layers=2, recomputed_layers=2)])
def test_the_same_step_gives_the_same_bits(tmp_path, documents, saving):
    model = model_of(tmp_path, "llama", dropout=0.05)
    model.train()
    batch, results = micro_batch(documents, range(3)).to(CUDA), []
    for each in (PLAIN, saving):
        engine = fast(model, each)
        for parameter in trainable(model):
            parameter.grad = None
        losses = engine.accumulate(batch, targets=batch.targets, seed=3)
        results.append([losses, *(parameter.grad for parameter in trainable(model))])

    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_what_is_replayed_is_the_step(tmp_path, documents, dropout):
    """To the bit the same each time, and as it is launched in the same size, where there is no memory to record it.

    Within rounding it is what the step gives without padding.
    """
    model = model_of(tmp_path, "qwen3", dropout=dropout)
    model.train()
    adapter = FlatAdapter(model)
    plain, played, launched = fast(model), fast(model), fast(model)
    for engine in (played, launched):
        engine.adopt(cut_of(2048, engine="fast", kept_layers=1, recomputed_layers=1))
    launched._step._most_recorded = 0
    results, order = [], [(plain, (0, 1, 2)), (played, (0, 1, 2)), (played, (1, 2)), (played, (0, 1, 2))]
    for engine, members in [*order, (launched, (0, 1, 2))]:
        batch = micro_batch(documents, members).to(CUDA)
        adapter.clear()
        engine.refresh()
        losses = engine.accumulate(batch, targets=batch.targets, seed=3)
        results.append([losses, *(vector.grad.clone() for vector in adapter.vectors)])

    assert not played._step._failed
    for same in (results[3], results[4]):
        assert all(torch.equal(one, other) for one, other in zip(results[1], same, strict=True))
    for one, other in zip(results[0], results[1], strict=True):
        assert float((one - other).norm() / one.norm()) < 0.02


@pytest.mark.parametrize("tokens", [0, 2048], ids=["launched", "replayed"])
def test_streams_beside_the_step_find_complete_gradients(tmp_path, documents, tokens):
    """Copied beside the step as soon as a layer's are said to be complete: they are those at its end."""
    model = model_of(tmp_path, "llama")
    FlatAdapter(model)
    engine, beside, copies = fast(model), torch.cuda.Stream(), []
    if tokens:
        engine.adopt(cut_of(tokens, engine="fast", kept_layers=2))

    def copy(parameters, after):
        assert (after is not None) == bool(tokens)
        if after is None:
            beside.wait_stream(torch.cuda.current_stream())
        else:
            beside.wait_event(after)
        with torch.cuda.stream(beside):
            copies.extend((each, each.grad.clone()) for each in parameters)

    engine.watch(copy)
    batch = micro_batch(documents, range(3)).to(CUDA)
    for _step in range(3):  # the first one is recorded
        copies.clear()
        torch.cuda._sleep(10**8)  # the step runs long after it is launched
        engine.accumulate(batch, targets=batch.targets, seed=3)
        torch.cuda.synchronize()

        assert sorted(id(each) for each, _ in copies) == sorted(map(id, trainable(model)))
        assert all(torch.equal(each.grad, copy) for each, copy in copies)


def test_a_changed_adapter_is_replayed_too(tmp_path, documents):
    model = model_of(tmp_path, "llama")
    adapter = FlatAdapter(model)
    engine = fast(model)
    engine.adopt(cut_of(2048, engine="fast", kept_layers=2))
    batch = micro_batch(documents, range(3)).to(CUDA)
    losses = []
    for _step in range(3):
        engine.refresh()
        losses.append(engine.accumulate(batch, targets=batch.targets, seed=3))
        for vector in adapter.vectors:
            vector.data.add_(torch.randn_like(vector), alpha=0.05)
        adapter.clear()

    assert not torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[1], losses[2])
    unrecorded = fast(model)
    for vector in adapter.vectors:
        assert vector.grad is not None
    engine.refresh()
    unrecorded.refresh()
    last, expected = (each.accumulate(batch, targets=batch.targets, seed=3) for each in (engine, unrecorded))
    assert float((last - expected).abs().max()) < 0.05


def test_dropout_s_kernels_are_the_reference_s(tmp_path):
    from job.kernels import triton_elementwise as kernels

    masks = Masks(seed=torch.tensor([5], device=CUDA), site=9, adapters=3, rate=0.05)
    for rows in (300, 3000):
        x, a = torch.randn(rows, 1056, device=CUDA).bfloat16(), torch.randn(96, 1056, device=CUDA).bfloat16() / 32
        thin, results = torch.randn(rows, 96, device=CUDA).bfloat16(), []
        for ops in (kernels, reference):
            out, into = torch.empty_like(thin), x.clone()
            ops.masked_ranks(x, a, out, masks)
            ops.masked_add(thin, a, into, masks)
            results.append((out, into, ops.masked_gradient(thin, x, masks)))
        for one, other in zip(*results, strict=True):
            assert float((one.float() - other.float()).norm() / other.float().norm()) < 3e-3


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("length", [200, 700])
def test_attention_s_gradient_has_the_same_bits_each_time(length, own):
    """Documents of several blocks of keys: their shares of a query's gradient are added in one order."""
    lengths = (length, 33, length + 100, 512)
    cu_seqlens = torch.tensor([0, *lengths], device=CUDA).cumsum(0).to(torch.int32)
    tokens, attention = sum(lengths), Attention(scale=128**-0.5, window=None)
    facts = Segments(cu_seqlens=cu_seqlens, lengths=lengths, blocks=blocks_of(cu_seqlens, tokens) if own else None)
    query, key, value, grad = (torch.randn(tokens, 32, 128, device=CUDA).bfloat16() for _ in range(4))
    out, kept = attention.forward(query, key, value, facts)
    first = attention.backward(grad, query, key, value, out, kept, facts)
    for _again in range(20):
        other = attention.backward(grad, query, key, value, out, kept, facts)
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("width", OWN_WIDTHS)
@pytest.mark.parametrize("key_heads", [1, 4, 8])
def test_our_attention_passes_its_own_test(width, key_heads):
    assert difference_from_formula(CUDA, heads=8, key_heads=key_heads, width=width) is None


@pytest.mark.parametrize(("wanted", "name"), [("auto", "fast"), ("generic", "generic")])
def test_our_attention_is_chosen_on_hopper_alone(tmp_path, wanted, name):
    model = model_of(tmp_path, "llama")
    made = choose_engine(model, wanted, backward=torch.Tensor.backward)

    assert made.name == name
    assert model.attention.own is (torch.cuda.get_device_capability()[0] == 9)
    assert ("attention by torch's kernels" in made.reason) is not model.attention.own
