"""Compiled layers give what uncompiled ones give, are compiled once for any documents, and give way on failure."""

from pathlib import Path

import pytest
import torch
from tiny import LAYERS, adapted, cut_of, gradients, micro_batch

from job.core.recipe.schema import LoraSection
from job.kernels import linear_op as layer_op
from job.tune.engines import layers
from job.tune.engines.attention_choice import AttentionChoice
from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.decoder_inputs import decoder_inputs
from job.tune.engines.layers import variants_compiled
from job.tune.model.adapter import trainable

BACKEND = "aot_eager"  # all of the compiler but its kernels
OF_A_FEW = [[0, 3], [5], [1, 2, 6]]


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(bases, architecture, *, dropout=0.0):
    lora = LoraSection(r=4, alpha=8, dropout=dropout, targets=("q_proj", "down_proj", "lm_head"))
    model = adapted(bases[architecture], lora, moved=True)
    model.train()
    return model


def compiled(model, backend=BACKEND, backward=torch.Tensor.backward):
    engine = AutogradEngine(model, backward, compiler=backend)
    engine.adopt(cut_of(4096, compiled=True))
    return engine


def done(engine, model, batch):
    return engine.accumulate(batch, targets=batch.targets, seed=3), gradients(model)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_code_compiled_for_other_ops_is_not_taken_from_a_cache(bases, tmp_path):
    """Caches on disk outlive an image, and do not see that an op's backward has changed."""
    compiled(model_of(bases, "llama"))
    (tmp_path / "op.py").write_text("1")
    before = layers.digest_of(tmp_path)
    (tmp_path / "op.py").write_text("2")

    assert torch.compiler.config.cache_key_tag == layers.digest_of(Path(layer_op.__file__).parent)
    assert layers.digest_of(tmp_path) != before


def test_one_document_is_followed_by_an_empty_one(documents):
    batch = micro_batch(documents, [0])
    made = decoder_inputs(batch, in_blocks=True, for_compiled_code=True)
    assert made["document_cu_seqlens"].tolist() == [0, batch.tokens, batch.tokens]
    assert made["document_lengths"].tolist() == [batch.tokens, 0]
    assert made["document_blocks"].shape[0] >= 2  # a number of one would be a constant of compiled code
    assert made["input_ids"] is batch.input_ids


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gpt_neox"])
def test_one_code_for_any_number_of_tokens_and_documents(bases, documents, architecture):
    lora = LoraSection(r=4, alpha=8, targets="all-linear")
    model = adapted(bases[architecture], lora, moved=True)
    model.train()
    sizes = [[0], range(3), range(len(documents)), [2, 1], [5, 5, 5, 5, 5]]
    batches = [micro_batch(documents, members) for members in sizes]
    assert len({batch.tokens for batch in batches}) == len(batches)
    expected = [done(AutogradEngine(model, torch.Tensor.backward), model, batch) for batch in batches]
    engine, before = compiled(model), variants_compiled()
    engine.compile_ahead(batches[0])
    gradients(model)
    assert variants_compiled() - before == 2

    for batch, other in zip(batches, expected, strict=True):
        assert_same(done(engine, model, batch), other)
    assert variants_compiled() - before == 2
    assert engine.recompilations == ()


def test_what_is_compiled_after_that_is_noted_with_the_reason(bases, documents):
    model, batch = model_of(bases, "llama"), micro_batch(documents, range(3))
    engine = compiled(model)
    engine.compile_ahead(batch)
    engine.adopt(cut_of(4096, compiled=True, kept_layers=LAYERS))
    done(engine, model, batch)

    assert len(engine.recompilations) == 1
    assert "mismatch" in engine.recompilations[0]  # with what the guard of the code before looks at first
    assert "\n" not in engine.recompilations[0]
    done(engine, model, batch)
    assert len(engine.recompilations) == 1


def test_without_compiled_layers_there_is_nothing_to_compile_ahead(bases, documents):
    model = model_of(bases, "llama")
    engine = AutogradEngine(model, torch.Tensor.backward)
    engine.adopt(cut_of(4096))
    engine.compile_ahead(micro_batch(documents, [0]))
    assert gradients(model) == {}


def test_one_variant_for_the_first_layer_and_one_for_the_others_recomputed_or_not(bases, documents):
    model = model_of(bases, "qwen3", dropout=0.3)
    batches = [micro_batch(documents, members) for members in OF_A_FEW]
    expected = [done(AutogradEngine(model, torch.Tensor.backward), model, batch) for batch in batches]
    before = variants_compiled()
    engine = compiled(model)
    found = [done(engine, model, batch) for batch in batches]
    engine.adopt(cut_of(4096, compiled=True, recomputed_layers=LAYERS))
    again = [done(engine, model, batch) for batch in batches]

    assert variants_compiled() - before == 2
    for one, two, other in zip(found, again, expected, strict=True):
        assert_same(one, other)
        assert_same(two, other)


def test_where_there_is_no_backward_nothing_is_compiled(bases, documents):
    model = model_of(bases, "llama")
    before = variants_compiled()
    compiled(model)
    model.score(micro_batch(documents, range(3)))

    assert variants_compiled() == before


@pytest.mark.parametrize("wanted", [True, False])
def test_layers_are_compiled_where_the_cut_says_so(bases, documents, wanted):
    model = model_of(bases, "llama")
    engine = AutogradEngine(model, torch.Tensor.backward, compiler=BACKEND)
    before = variants_compiled()
    engine.adopt(cut_of(4096, compiled=wanted))
    done(engine, model, micro_batch(documents, [0]))

    assert (variants_compiled() > before) is wanted


def fails_forward(_graph, _inputs):
    msg = "no compiler here"
    raise RuntimeError(msg)


def fails_in_the_backward(graph, inputs):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda made, _: make_boxed_func(made.forward), bw_compiler=fails_forward)(
        graph, inputs
    )


@pytest.mark.parametrize("backend", [fails_forward, fails_in_the_backward])
def test_where_the_compiler_fails_layers_run_uncompiled_and_gradients_are_whole(bases, documents, backend):
    model = model_of(bases, "llama", dropout=0.3)
    batch, other = micro_batch(documents, range(3)), micro_batch(documents, range(3, 6))
    plain = AutogradEngine(model, torch.Tensor.backward)
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    expected = done(plain, model, batch), done(plain, model, other)
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    engine = compiled(model, backend)
    found = done(engine, model, batch), done(engine, model, other)

    assert "no compiler here" in engine.compiler_failure
    assert not model.layers.compiled
    for one, wanted in zip(found, expected, strict=True):
        assert_same(one, wanted)


def test_memory_that_runs_out_before_the_first_backward_leaves_it_a_way_out(bases, documents):
    model, tried = model_of(bases, "llama", dropout=0.3), []
    batch = micro_batch(documents, range(3))
    expected = done(AutogradEngine(model, torch.Tensor.backward), model, batch)

    def scarce(total):
        tried.append(total)
        if len(tried) == 1:
            raise torch.OutOfMemoryError
        total.backward()

    engine = compiled(model, fails_in_the_backward, scarce)
    with pytest.raises(torch.OutOfMemoryError):
        done(engine, model, batch)
    for parameter in trainable(model):
        parameter.grad = None

    assert_same(done(engine, model, batch), expected)
    assert "no compiler here" in engine.compiler_failure


def test_a_model_that_needs_too_many_variants_is_not_compiled_all_the_time(bases, documents, monkeypatch):
    monkeypatch.setattr(layers, "_MOST_VARIANTS", 1)
    model = model_of(bases, "llama")
    engine = compiled(model)
    done(engine, model, micro_batch(documents, [0]))  # two kinds of layer

    assert "LimitHit" in engine.compiler_failure
    assert not model.layers.compiled


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_compiled_layers_may_have_our_own_attention(bases, documents, own_kernels, architecture):
    """The number of blocks is no part of the code."""
    model = model_of(bases, architecture)
    batches = [micro_batch(documents, members) for members in OF_A_FEW]
    expected = [done(AutogradEngine(model, torch.Tensor.backward), model, batch) for batch in batches]
    assert own_kernels.calls == 0
    model.attention = AttentionChoice(own=True, reason=None)
    before, engine = variants_compiled(), compiled(model)
    found = [done(engine, model, batch) for batch in batches]

    assert own_kernels.calls == 2 * len(batches)  # layers
    assert variants_compiled() - before == 2
    assert engine.compiler_failure is None
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_weights_are_kept_or_given_up_by_the_cut(bases, documents):
    model, batch = model_of(bases, "llama"), micro_batch(documents, range(3))
    engine = compiled(model)
    plain = done(engine, model, batch)
    for kept in (LAYERS, 0):
        engine.adopt(cut_of(4096, compiled=True, kept_layers=kept))
        assert model.linears.keeps_dequantised is bool(kept)
        assert_same(done(engine, model, batch), plain)
