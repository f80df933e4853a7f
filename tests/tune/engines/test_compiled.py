"""Compiled layers give what they give as they are, once for any documents, and give way where they cannot."""

from pathlib import Path

import pytest
import torch
from tiny import adapted, gradients, micro_batch, plan_of

from job.core.recipe import LoraSection
from job.kernels import linear_op as layer_op
from job.tune.device.random_state import random_state as generators
from job.tune.engines import layers
from job.tune.engines.attention_choice import AttentionChoice
from job.tune.engines.autograd import AutogradEngine, Compiling
from job.tune.engines.layers import variants_compiled
from job.tune.engines.padding import decoder_inputs, grain_of, padded_size
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


def compiled(model, told=None, backend=BACKEND):
    stopped = [] if told is None else told
    path = AutogradEngine(model, torch.Tensor.backward, compiling=Compiling(backend=backend, on_stopped=stopped.append))
    path.adopt(plan_of(4096))
    return path


def done(path, model, batch):
    torch.manual_seed(3)
    return path.accumulate(batch, targets=batch.targets), gradients(model)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_code_compiled_for_other_ops_is_not_taken_from_a_cache(bases, tmp_path):
    """Caches on disk outlive an image, and do not see that an op's way back has changed."""
    compiled(model_of(bases, "llama"))
    (tmp_path / "op.py").write_text("1")
    before = layers.digest_of(tmp_path)
    (tmp_path / "op.py").write_text("2")

    assert torch.compiler.config.cache_key_tag == layers.digest_of(Path(layer_op.__file__).parent)
    assert layers.digest_of(tmp_path) != before


def test_sizes_are_few_and_waste_little():
    for budget in (300, 1024, 2049, 15360, 24576):
        grain = grain_of(budget)
        sizes = {padded_size(tokens, grain) for tokens in range(1, budget + 1)}
        assert len(sizes) <= 32
        assert all(0 <= padded_size(tokens, grain) - tokens < 64 + budget / 32 for tokens in range(1, budget + 1))


def test_padding_is_a_document_of_its_own_and_changes_no_bit(any_model, documents):
    batch = micro_batch(documents, range(3))
    filled = decoder_inputs(batch, tokens=192)
    assert filled["document_cu_seqlens"].tolist() == [*batch.cu_seqlens.tolist(), 192]
    assert filled["document_lengths"].tolist() == [*batch.document_lengths, 192 - batch.tokens]
    any_model.eval()
    with torch.no_grad():
        plain = any_model.summed_loss(batch, weight_per_target=1.0)[1]
        for tokens in (batch.tokens, 192):
            assert torch.equal(any_model.summed_loss(batch, weight_per_target=1.0, padded_to=tokens)[1], plain)


def test_one_variant_for_the_first_layer_and_one_for_the_others_computed_again_or_not(bases, documents):
    model = model_of(bases, "qwen3", dropout=0.3)
    batches = [micro_batch(documents, members) for members in OF_A_FEW]
    expected = [done(AutogradEngine(model, torch.Tensor.backward), model, batch) for batch in batches]
    before = variants_compiled()
    path = compiled(model)
    found = [done(path, model, batch) for batch in batches]
    path.adopt(plan_of(4096, checkpointing=True))
    again = [done(path, model, batch) for batch in batches]

    assert variants_compiled() - before == 2
    for one, two, other in zip(found, again, expected, strict=True):
        assert_same(one, other)
        assert_same(two, other)


def test_where_there_is_no_way_back_nothing_is_compiled(bases, documents):
    model = model_of(bases, "llama")
    before = variants_compiled()
    compiled(model)
    model.score(micro_batch(documents, range(3)))

    assert variants_compiled() == before


@pytest.mark.parametrize("said", [{"compiled": True}, {"compiled": False}, {}])
def test_layers_are_compiled_where_the_plan_says_so_or_is_an_older_image_s(bases, documents, said):
    model = model_of(bases, "llama")
    path = AutogradEngine(model, torch.Tensor.backward, compiling=Compiling(backend=BACKEND, on_stopped=print))
    before = variants_compiled()
    path.adopt(plan_of(4096, **said))
    done(path, model, micro_batch(documents, [0]))

    assert (variants_compiled() > before) is said.get("compiled", True)


def fails_forward(_graph, _inputs):
    msg = "no compiler here"
    raise RuntimeError(msg)


def fails_on_the_way_back(graph, inputs):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda made, _: make_boxed_func(made.forward), bw_compiler=fails_forward)(
        graph, inputs
    )


@pytest.mark.parametrize("backend", [fails_forward, fails_on_the_way_back])
def test_where_the_compiler_fails_layers_run_as_they_are_and_gradients_are_whole(bases, documents, backend):
    model, told = model_of(bases, "llama", dropout=0.3), []
    batch, other = micro_batch(documents, range(3)), micro_batch(documents, range(3, 6))
    plain = AutogradEngine(model, torch.Tensor.backward)
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    expected = done(plain, model, batch), done(plain, model, other)
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    path = compiled(model, told, backend)
    found = done(path, model, batch), done(path, model, other)

    assert len(told) == 1
    assert "no compiler here" in told[0]
    for one, wanted in zip(found, expected, strict=True):
        assert_same(one, wanted)


def test_where_the_compiler_fails_the_gpu_s_generator_is_put_back_too(bases, documents, monkeypatch):
    state = torch.tensor([7])
    monkeypatch.setattr(generators, "cuda_in_use", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: state.clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda saved, *_: state.copy_(saved))

    def draws_and_fails(graph, inputs):
        state.add_(1)
        fails_forward(graph, inputs)

    model = model_of(bases, "llama")
    done(compiled(model, backend=draws_and_fails), model, micro_batch(documents, [0]))

    assert int(state) == 7


def test_memory_that_runs_out_before_the_first_way_back_leaves_it_a_way_out(bases, documents):
    model, told, tried = model_of(bases, "llama", dropout=0.3), [], []
    batch = micro_batch(documents, range(3))
    expected = done(AutogradEngine(model, torch.Tensor.backward), model, batch)

    def scarce(total):
        tried.append(total)
        if len(tried) == 1:
            raise torch.OutOfMemoryError
        total.backward()

    path = AutogradEngine(model, scarce, compiling=Compiling(backend=fails_on_the_way_back, on_stopped=told.append))
    path.adopt(plan_of(4096))
    with pytest.raises(torch.OutOfMemoryError):
        done(path, model, batch)
    for parameter in trainable(model):
        parameter.grad = None

    assert_same(done(path, model, batch), expected)
    assert "no compiler here" in told[0]


def test_a_model_that_needs_too_many_variants_is_not_compiled_all_the_time(bases, documents, monkeypatch):
    monkeypatch.setattr(layers, "_MOST_VARIANTS", 1)
    model, told = model_of(bases, "llama"), []
    done(compiled(model, told), model, micro_batch(documents, [0]))  # two kinds of layer

    assert "LimitHit" in told[0]
    assert not model.layers.compiled


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_compiled_layers_may_have_the_engine_s_own_attention(bases, documents, own_kernels, architecture):
    """Their blocks are those of the documents as they are filled up; how many there are is no part of the code."""
    model, told = model_of(bases, architecture), []
    batches = [micro_batch(documents, members) for members in OF_A_FEW]
    expected = [done(AutogradEngine(model, torch.Tensor.backward), model, batch) for batch in batches]
    assert own_kernels.calls == 0
    model.attention = AttentionChoice(own=True, reason=None)
    before, path = variants_compiled(), compiled(model, told)
    found = [done(path, model, batch) for batch in batches]

    assert own_kernels.calls == 2 * len(batches)  # layers
    assert variants_compiled() - before == 2
    assert told == []
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_weights_are_kept_or_given_up_by_the_plan(bases, documents):
    model, batch = model_of(bases, "llama"), micro_batch(documents, range(3))
    path = compiled(model)
    plain = done(path, model, batch)
    assert path.give_up_weights() is None
    path.adopt(plan_of(4096, kept_layers=2))
    assert model.linears.keeps_dequantised
    assert_same(done(path, model, batch), plain)
    assert path.give_up_weights() == {"kept_layers": 0}
    assert not model.linears.keeps_dequantised
    assert path.give_up_weights() is None
    assert_same(done(path, model, batch), plain)
