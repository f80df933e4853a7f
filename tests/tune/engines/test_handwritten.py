"""The hand-written step gives autograd's losses and gradients, and the run that autograd would have made."""

import re
from dataclasses import replace

import pytest
import torch
from tiny import EVERY_LINEAR, FAMILY, LAYERS, adapted, config_of, cut_of, gradients, micro_batch, write_base

from job.core.errors import UsageError
from job.core.recipe.schema import LoraSection
from job.kernels import cuda_graphs as replay
from job.kernels import llama_step as llama
from job.kernels import reference
from job.kernels.attention import Segments
from job.kernels.decoder import Saving
from job.kernels.ops import Masks
from job.tune.engines.attention_choice import AttentionChoice
from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.choice import choose_engine
from job.tune.engines.families import reason_against
from job.tune.engines.handwritten import HandwrittenEngine, _row
from job.tune.engines.selftest import difference
from job.tune.model.adapter import trainable

SEED = 5
PLAIN = Saving(kept_layers=0, recomputed_layers=0)
TARGETS = {"some": ("q_proj", "v_proj", "down_proj"), "every": EVERY_LINEAR, "linear": "all-linear"}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Architecture -> folder."""
    root = tmp_path_factory.mktemp("family")
    return {name: write_base(root / name, config_of(name)) for name in FAMILY}


def lora_of(targets="every", *, dropout=0.0):
    return LoraSection(r=4, alpha=8, dropout=dropout, targets=TARGETS[targets])


def fast(model, saving=PLAIN, ops=reference):
    return HandwrittenEngine(model, ops, dtype=torch.float32, saving=saving)


def generic(model):
    return AutogradEngine(model, torch.Tensor.backward)


def done(engine, model, batch, *, targets=None):
    """Losses and gradients of a micro-batch."""
    losses = engine.accumulate(batch, targets=targets or batch.targets, seed=SEED)
    return losses, gradients(model)


def assert_close(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("architecture", FAMILY)
def test_losses_and_gradients_are_autograd_s(family, documents, architecture, targets):
    model = adapted(family[architecture], lora_of(targets), moved=True)
    batch = micro_batch(documents, range(len(documents)))

    assert_close(done(fast(model), model, batch), done(generic(model), model, batch))


@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_our_own_attention_changes_nothing(family, documents, own_kernels, architecture):
    """Its gradients land where the next product reads them, and are rotated in that memory."""
    model = adapted(family[architecture], lora_of(), moved=True)
    batch = micro_batch(documents, range(len(documents)))
    expected = done(fast(model), model, batch)
    assert own_kernels.calls == 0
    model.attention = AttentionChoice(own=True, reason=None)
    for engine in (fast(model), fast(model, Saving(kept_layers=0, recomputed_layers=2)), generic(model)):
        before = own_kernels.calls
        assert_close(done(engine, model, batch), expected)
        assert own_kernels.calls > before


def test_a_tied_head_is_projected_with_the_embedding(tied_base, documents):
    model = adapted(tied_base, lora_of("linear"), moved=True)
    batch = micro_batch(documents, range(4))

    assert_close(done(fast(model), model, batch), done(generic(model), model, batch))


@pytest.mark.parametrize(
    "saving", [Saving(kept_layers=1, recomputed_layers=1), Saving(kept_layers=2, recomputed_layers=2)]
)
def test_saving_memory_changes_no_bit(family, documents, saving):
    model = adapted(family["qwen3"], lora_of(dropout=0.1), moved=True)
    model.train()
    batch = micro_batch(documents, range(4))
    results = [done(fast(model, each), model, batch) for each in (PLAIN, saving)]

    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_gradients_of_micro_batches_add_up(family, documents):
    model = adapted(family["llama"], lora_of(), moved=True)
    engine, whole = fast(model), micro_batch(documents, range(8))
    expected = done(engine, model, whole)
    parts = [micro_batch(documents, members) for members in (range(3), range(3, 8))]
    losses = torch.cat([engine.accumulate(part, targets=whole.targets, seed=SEED) for part in parts])

    assert_close((losses, gradients(model)), expected)


def test_the_logits_of_a_large_vocabulary_come_in_chunks(family, documents, monkeypatch):
    model = adapted(family["llama"], lora_of(), moved=True)
    batch = micro_batch(documents, range(8))
    expected = done(fast(model), model, batch)
    monkeypatch.setattr(llama, "LOGITS_AT_ONCE", 300 * 5)  # five targets

    assert_close(done(fast(model), model, batch), expected)


@pytest.fixture
def unwritten_is_nan(monkeypatch):
    """Memory that nobody has written into holds no number."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unwritten_is_nan")
def test_rows_of_a_product_have_numbers_as_far_as_the_next_row(family, documents, monkeypatch):
    """Kernels of CPUs with AMX multiply what lies beyond a row's end by zero."""
    model, product, looked_at = adapted(family["llama"], lora_of(), moved=True), torch.mm, []

    def looking(left, right, **options):
        for factor in (left, right):
            rows = factor if factor.stride(1) == 1 else factor.t()
            apart = rows.stride(0)
            beyond = rows.as_strided((len(rows) - 1, apart), (apart, 1))
            looked_at.append(apart > rows.shape[1])
            assert beyond.isfinite().all()
        return product(left, right, **options)

    monkeypatch.setattr(torch, "mm", looking)
    fast(model).accumulate(micro_batch(documents, range(8)), targets=100, seed=SEED)
    assert any(looked_at)


def test_a_document_does_not_move_when_its_neighbour_changes(family, documents):
    model = adapted(family["mistral"], lora_of(), moved=True)
    engine, batch = fast(model), micro_batch(documents, range(4))
    losses, _ = done(engine, model, batch)
    ids = batch.input_ids.clone()
    ids[0, : batch.document_lengths[0]] = ids[0, : batch.document_lengths[0]].flip(0)
    other, _ = done(engine, model, replace(batch, input_ids=ids))
    own = batch.target_counts[0]

    assert not torch.equal(losses[:own], other[:own])
    assert torch.equal(losses[own:], other[own:])


class MaskLike(torch.nn.Module):
    """Stands for PEFT's dropout module."""

    def __init__(self, masks, adapter):
        super().__init__()
        self.masks, self.adapter, self.p = masks, adapter, masks.rate

    def forward(self, x):
        kept = reference.kept(x.shape[-2:], self.masks, self.adapter)
        return torch.where(kept, x, 0.0) / (1 - self.p)


def test_dropout_is_peft_s_with_the_same_masks(family, documents):
    rate = 0.3
    model = adapted(family["llama"], lora_of(dropout=rate), moved=True)
    model.train()
    batch = micro_batch(documents, range(4))
    engine = fast(model)
    found = done(engine, model, batch)
    seed = torch.tensor([SEED])
    causal_lm = model.model.get_base_model()

    def drop(site, *modules):
        masks = Masks(seed=seed, site=site, adapters=len(modules), rate=rate)
        for number, module in enumerate(modules):
            module.lora_dropout["default"] = MaskLike(masks, number)

    for index, layer in enumerate(causal_lm.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        drop(4 * index, attention.q_proj, attention.k_proj, attention.v_proj)
        drop(4 * index + 1, attention.o_proj)
        drop(4 * index + 2, mlp.gate_proj, mlp.up_proj)
        drop(4 * index + 3, mlp.down_proj)
    drop(llama._HEAD_SITE, causal_lm.lm_head)

    with model.linears.as_peft_has_them():
        assert_close(found, done(generic(model), model, batch))


@pytest.mark.parametrize("own_attention", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_padded_micro_batch_is_the_same(family, documents, own_kernels, dropout, own_attention):
    """As it is recorded on a GPU: more tokens, more documents, more places, none of them a target."""
    model = adapted(family["qwen3"], lora_of(dropout=dropout), moved=True)
    model.attention = AttentionChoice(own=own_attention, reason=None)
    engine, batch = fast(model), micro_batch(documents, range(3))
    row = _row(batch, targets=batch.targets, seed=7 if dropout else None)
    expected = engine._step.accumulate(row), gradients(model)
    for parameter in trainable(model):
        parameter.grad = None
    room = replay.empty_row(replay.rounded(row, finely=False), row)
    for _twice in range(2):  # what stood there before is gone
        replay.fill(room, row)
    room = replace(
        room, segments=Segments(cu_seqlens=room.segments.cu_seqlens, lengths=lengths_in(room.segments.cu_seqlens))
    )
    losses = engine._step.accumulate(room)

    assert bool(own_kernels.calls) is own_attention
    assert len(losses) > len(expected[0])
    assert not losses[len(expected[0]) :].any()
    assert_close((losses[: len(expected[0])], gradients(model)), expected)


def lengths_in(cu_seqlens):
    """What the GPU's kernel reads from cu_seqlens, where the CPU's attention takes lengths."""
    return tuple(int(length) for length in cu_seqlens.diff())


def test_padded_micro_batches_have_few_sizes(family, documents):
    row = _row(micro_batch(documents, range(3)), targets=1, seed=None)
    small = replay.rounded(row, finely=False)

    assert small.tokens % 128 == 0
    assert small.tokens > len(row.ids)
    assert small.segments == 4
    sizes = {replay.rounded(replace(row, ids=torch.empty(tokens)), finely=False).tokens for tokens in range(1, 4096)}
    assert len(sizes) == 16


def test_evaluation_has_no_dropout(family, documents):
    model = adapted(family["llama"], lora_of(dropout=0.5), moved=True)
    model.eval()
    batch = micro_batch(documents, range(4))

    assert_close(done(fast(model), model, batch), done(generic(model), model, batch))


# --- a whole attempt -------------------------------------------------------------------------------------------------


def on_fast_engine(made, saving=PLAIN):
    made.engine = fast(made.model, saving)
    return made


def test_a_run_is_the_one_that_autograd_makes(start, family):
    options = {"base": family["llama"], "lora": lora_of(), "batch_size": 4, "steps": 6}
    expected = start(**options).run(evaluate_every=3)
    made = on_fast_engine(start(**options), Saving(kept_layers=2, recomputed_layers=0)).run(evaluate_every=3)

    assert made.progress.losses == pytest.approx(expected.progress.losses, rel=1e-4)
    assert made.progress.evaluations[6].loss == pytest.approx(expected.progress.evaluations[6].loss, rel=1e-4)


@pytest.mark.parametrize(("kept", "recomputed"), [(2, 0), (0, 0), (0, LAYERS)])
def test_weights_kept_or_not_and_activations_recomputed_or_not_it_is_the_same_step(start, family, kept, recomputed):
    made = on_fast_engine(start(base=family["llama"], lora=lora_of(), steps=1))
    made.engine.adopt(cut_of(64, engine="fast", kept_layers=kept, recomputed_layers=recomputed))
    expected = start(base=family["llama"], lora=lora_of(), steps=1).run(evaluate_every=9)
    assert made.run(evaluate_every=9).progress.losses == pytest.approx(expected.progress.losses, rel=1e-5)


# --- whether it may be taken -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILY)
def test_it_fits_the_family(family, architecture):
    assert reason_against(adapted(family[architecture], lora_of()).model) is None


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_neox"])
def test_it_does_not_fit_others(bases, architecture):
    model = adapted(bases[architecture], LoraSection(r=4, targets="all-linear"))

    assert "is not of the Llama family" in reason_against(model.model)


def with_config(tmp_path, **changes):
    config = config_of("llama")
    for name, value in changes.items():
        setattr(config, name, value)
    return adapted(write_base(tmp_path / "base", config), LoraSection(r=4, targets=("q_proj",)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"attention_dropout": 0.1}, "attention dropout"),
        ({"mlp_bias": True}, "has a bias"),
        ({"hidden_size": 40, "intermediate_size": 99}, "elements, no whole blocks of 64"),
    ],
)
def test_what_it_cannot_do_is_named(tmp_path, changes, reason):
    assert reason in reason_against(with_config(tmp_path, **changes).model)


def test_a_norm_with_a_zero_is_left_to_autograd(family):
    model = adapted(family["llama"], lora_of())
    model.model.get_base_model().model.norm.weight.data[3] = 0

    assert "model.norm has a weight of zero" in reason_against(model.model)


def test_asked_for_it_is_taken_once_it_agrees(family):
    model = adapted(family["llama"], lora_of())
    before = [parameter.clone() for parameter in trainable(model)]
    choice = choose_engine(model, "fast", backward=torch.Tensor.backward)

    assert (choice.name, type(choice.engine)) == ("fast", HandwrittenEngine)
    assert all(torch.equal(parameter, old) for parameter, old in zip(trainable(model), before, strict=True))
    assert all(parameter.grad is None for parameter in trainable(model))


def test_where_it_does_not_fit_asking_for_it_is_refused(bases):
    model = adapted(bases["gemma2"], LoraSection(r=4, targets="all-linear"))
    with pytest.raises(UsageError, match=r"--engine fast: .* not of the Llama family"):
        choose_engine(model, "fast", backward=torch.Tensor.backward)


@pytest.mark.parametrize("wanted", ["auto", "generic"])
def test_otherwise_autograd_trains(family, wanted):
    choice = choose_engine(adapted(family["llama"], lora_of()), wanted, backward=torch.Tensor.backward)

    assert (choice.name, type(choice.engine)) == ("generic", AutogradEngine)


class Spoilt:
    """The reference with one part that is wrong."""

    def __init__(self, name, wrong):
        self._name, self._wrong = name, wrong

    def __getattr__(self, name):
        return self._wrong if name == self._name else getattr(reference, name)


def other_scale(weight, out):
    reference.dequantise(weight, out)
    out.mul_(1.5)


def no_gradient(gate_up, grad, d_gate_up, out):
    reference.swiglu_backward(gate_up, grad, d_gate_up, out)
    d_gate_up.zero_()


def too_long(gate_up, grad, d_gate_up, out):
    reference.swiglu_backward(gate_up, grad, d_gate_up, out)
    d_gate_up.mul_(1.3)


def not_a_number(x, weight, out, rstd, epsilon):
    out.fill_(float("nan"))
    rstd.fill_(1)


def across_documents(x, cos, sin, weight, rstd, epsilon):
    reference.rotate_forward(x, cos, sin, weight, rstd, epsilon)
    x.add_(1e-4 * x.mean())


@pytest.mark.parametrize(
    ("part", "wrong", "told"),
    [
        ("dequantise", other_scale, "loss differs"),
        ("swiglu_backward", no_gradient, "the gradient of .* points elsewhere"),
        ("swiglu_backward", too_long, r"the gradient of .* is 1\.\d\d times as large"),
        ("rms_forward", not_a_number, "loss differs"),
        ("rotate_forward", across_documents, "a document changes its neighbour"),
    ],
)
def test_a_part_that_computes_something_else_is_found(family, part, wrong, told):
    model = adapted(family["llama"], lora_of())
    found = difference(model, fast(model, ops=Spoilt(part, wrong)), generic(model))

    assert re.search(told, found or "no difference")
