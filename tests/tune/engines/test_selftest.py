"""The start-up checks: healthy models pass, and each thing that has failed silently elsewhere ends the job."""

from dataclasses import replace

import pytest
import torch
from tiny import CPU, adapted, micro_batch
from tiny_families import write_family
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from job.core.errors import UsageError
from job.core.recipe.schema import LoraSection
from job.kernels import linear
from job.tune.data.trial_documents import text_of
from job.tune.engines import loss, packed_model, selftest
from job.tune.engines.attention import PER_DOCUMENT, per_document_attention, register
from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import _documents, _gradient_difference, check_model, difference
from job.tune.model.adapter import attach_lora
from job.tune.model.base import load_base


@pytest.fixture
def model(bases):
    """As the job has it before its first step: bf16, fresh adapter."""
    lora = LoraSection(r=4, dropout=0.1, targets=("v_proj", "lm_head"))
    return adapted(bases["llama"], lora, dtype=torch.bfloat16)


def test_every_architecture_passes_in_bf16_and_is_left_as_it_was(any_model, bases, documents):
    torch.manual_seed(3)
    before, was_training = torch.get_rng_state(), any_model.training
    check_model(any_model)
    assert torch.equal(torch.get_rng_state(), before)
    assert any_model.training is was_training
    assert all(parameter.grad is None for parameter in any_model.parameters())


def test_a_healthy_model_passes_in_bf16(model):
    model.train()
    check_model(model)
    assert model.training


def test_a_healthy_model_passes_on_the_examples_that_it_will_learn(model, documents):
    check_model(model, text_of(documents))


def test_what_it_is_tried_with_are_the_examples_one_behind_the_other(model, documents):
    text = text_of(documents)
    tried = _documents(model, CPU, text)
    assert [len(each) for each in tried] == [96, 48, 72]
    for place, document in enumerate(tried):
        whole = torch.cat([*text[place:]])
        assert torch.equal(document, whole.repeat(5)[: len(document)])


def test_little_text_is_tried_over_and_over(model):
    first, second, third = _documents(model, CPU, [torch.tensor([5, 6, 7]), torch.tensor([8, 9])])
    assert (first[:7].tolist(), second[:4].tolist()) == ([5, 6, 7, 8, 9, 5, 6], [8, 9, 8, 9])
    assert third[:4].tolist() == [5, 6, 7, 8]


def test_a_document_has_the_same_losses_wherever_it_stands(any_model, documents):
    any_model.eval()
    with torch.no_grad():
        first = any_model(micro_batch(documents, [0, 1, 2]))
        other = any_model(micro_batch(documents, [4, 1, 7]))
    counts = documents.targets.tolist()
    mine = first[counts[0] : counts[0] + counts[1]]
    theirs = other[counts[4] : counts[4] + counts[1]]
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_a_document_has_the_same_losses_to_the_bit_when_its_neighbour_changes(any_model, documents):
    batch = micro_batch(documents, [0, 1, 2])
    begin = batch.document_lengths[0]
    changed = micro_batch(documents, [0, 1, 2])
    changed.input_ids[0, 1:begin] = changed.input_ids[0, 1:begin] + 5
    any_model.eval()
    with torch.no_grad():
        before, after = any_model(batch), any_model(changed)
    kept = batch.target_counts[0]
    assert not torch.equal(before[:kept], after[:kept])
    assert torch.equal(before[kept:], after[kept:])


@pytest.fixture
def broken_attention():
    """Puts another attention in the place of ours."""
    yield lambda attention: AttentionInterface.register(PER_DOCUMENT, attention)
    register()


def test_attention_across_documents_is_found(model, broken_attention):
    def leaking(*arguments, document_cu_seqlens, document_lengths, **options):
        whole = {"document_cu_seqlens": document_cu_seqlens[[0, -1]], "document_lengths": document_lengths.sum()[None]}
        return per_document_attention(*arguments, **whole, **options)

    broken_attention(leaking)
    with pytest.raises(UsageError, match="LlamaForCausalLM: a document changes its neighbour"):
        check_model(model)


def test_a_loss_that_is_not_the_models_own_is_found(model, broken_attention):
    def sharper(*arguments, scaling, **options):
        return per_document_attention(*arguments, scaling=8 * scaling, **options)

    broken_attention(sharper)
    with pytest.raises(UsageError, match="LlamaForCausalLM: the loss of this job is"):
        check_model(model)


def test_an_unknown_factor_on_the_logits_is_found(model):
    model.model.get_base_model().config.final_logit_softcapping = 0.5
    with pytest.raises(UsageError, match="the loss of this job is"):
        check_model(model)


def test_a_rotation_chosen_by_the_longest_document_of_a_pack_is_found(tmp_path, monkeypatch):
    base = load_base(write_family(tmp_path, "phi3, longrope"), device=CPU, dtype=torch.float32)
    lora = LoraSection(r=4)
    check_model(PackedModel(attach_lora(base, lora, source="tiny", revision=None, seed=0)))

    base = load_base(tmp_path, device=CPU, dtype=torch.float32)
    monkeypatch.setattr(packed_model, "rotate_by_document", lambda _model: None)
    with pytest.raises(UsageError, match="Phi3ForCausalLM: a document changes its neighbour"):
        check_model(PackedModel(attach_lora(base, lora, source="tiny", revision=None, seed=0)))


def test_a_window_that_is_not_handed_on_is_found(tmp_path, broken_attention):
    def without_window(*arguments, sliding_window=None, **options):
        return per_document_attention(*arguments, **options)

    base = load_base(write_family(tmp_path, "ministral3"), device=CPU, dtype=torch.float32)
    model = PackedModel(attach_lora(base, LoraSection(r=4), source="tiny", revision=None, seed=0))
    broken_attention(without_window)
    with pytest.raises(UsageError, match="the loss of this job is"):
        check_model(model)


def test_a_base_that_makes_much_of_rounding_may_be_trained(broken_attention, monkeypatch):
    """Deep, of random weights, with sharp attention: each last bit of attention's results moves its losses."""

    def rounded_otherwise(*arguments, **options):
        result, *rest = per_document_attention(*arguments, **options)
        up = torch.randint(0, 2, result.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return (result + result * up * torch.finfo(result.dtype).eps, *rest)

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = Qwen3Config(vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=24, **heads)
    base = AutoModelForCausalLM.from_config(config)
    for name, parameter in base.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.constant_(parameter, 4.0)
    base.to(torch.bfloat16)
    model = PackedModel(attach_lora(base, LoraSection(r=4), source="tiny", revision=None, seed=0))
    broken_attention(rounded_otherwise)
    text = [torch.arange(40) % 7 + 5, torch.arange(60) % 11 + 3]
    check_model(model, text)

    monkeypatch.setattr(selftest, "_ROUNDING_TIMES", 0)
    with pytest.raises(UsageError, match="the loss of this job is"):
        check_model(model, text)


def test_an_adapter_that_learns_nothing_is_found(model, monkeypatch):
    """As where a loss reads the head's weight and so passes by its adapter."""

    def by_the_weight(hidden, targets, head, _true=loss.token_losses):
        return _true(hidden, targets, replace(head, module=head.module.base_layer))

    monkeypatch.setattr(loss, "token_losses", by_the_weight)
    with pytest.raises(UsageError, match=r"no gradient reaches .*lm_head.*lora_B"):
        check_model(model)


def test_attention_masks_and_sinks_beside_capped_scores_are_refused(llama):
    q, sinks = torch.zeros(1, 4, 3, 16), torch.zeros(4)
    capped = {"attention_mask": None, "s_aux": sinks, "softcap": 2.0}
    trained = {"attention_mask": None, "s_aux": sinks.clone().requires_grad_()}
    for extra in ({"attention_mask": torch.zeros(1, 1, 3, 3)}, capped, trained):
        with pytest.raises(UsageError, match="packing does not support"):
            per_document_attention(llama, q, q, q, document_cu_seqlens=None, document_lengths=None, **extra)


# --- two engines' gradients ------------------------------------------------------------------------------------------

ADAPTERS = [f"layers.{layer}.{kind}.lora_A" for layer in range(8) for kind in ("q_proj", "down_proj")]


def gradients_of(**factors):
    """Eight layers' gradients, those of a kind `..._proj=1.06` or of one adapter by its whole name longer."""
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(4, 16, generator=generator) for name in ADAPTERS}
    for part, factor in factors.items():
        found |= {name: gradient * factor for name, gradient in found.items() if part in name}
    return found


@pytest.mark.parametrize("factor", [0.97, 1.0, 1.03])
def test_gradients_that_rounding_made_longer_or_shorter_are_the_same(factor):
    assert _gradient_difference(gradients_of(_proj=factor), gradients_of()) is None


@pytest.mark.parametrize("factor", [1 / 1.3, 0.94, 1.06, 1.3])
@pytest.mark.parametrize("kind", ["q_proj", "down_proj"])
def test_a_scale_of_one_kind_of_adapter_is_found_in_either_direction(kind, factor):
    against = _gradient_difference(gradients_of(**{kind: factor}), gradients_of())

    assert f"{factor:.2f} times as large" in against
    assert kind in against


def test_a_scale_of_one_adapter_alone_is_found():
    assert _gradient_difference(gradients_of(**{"layers.3.q_proj": 1.1}), gradients_of()) is None
    assert "layers.3.q_proj" in _gradient_difference(gradients_of(**{"layers.3.q_proj": 1.2}), gradients_of())


@pytest.mark.parametrize("spoilt", [-1.0, float("nan"), float("inf"), 0.0])
def test_a_gradient_that_points_elsewhere_or_nowhere_is_found(spoilt):
    assert "layers.5.q_proj" in _gradient_difference(gradients_of(**{"layers.5.q_proj": spoilt}), gradients_of())


def test_an_adapter_without_a_gradient_is_found():
    ours = gradients_of()
    del ours[ADAPTERS[3]]

    assert _gradient_difference(ours, gradients_of()) == f"{ADAPTERS[3]} gets no gradient"


def test_of_a_deep_base_that_makes_much_of_rounding_as_much_is_allowed_and_a_wrong_scale_is_found(monkeypatch):
    """A last bit of its embedding turns gradients 64 layers away further than two right engines may be apart."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 64}
    base = AutoModelForCausalLM.from_config(LlamaConfig(initializer_range=0.13, **heads, **sizes)).to(torch.bfloat16)
    model = PackedModel(attach_lora(base, LoraSection(r=4), source="tiny", revision=None, seed=0))
    engine = AutogradEngine(model, torch.Tensor.backward)
    text = [torch.arange(40) % 7 + 5, torch.arange(60) % 11 + 3]
    assert difference(model, engine, engine, text) is None

    with monkeypatch.context() as patched:
        patched.setattr(selftest, "_ROUNDING_TIMES", 0)
        assert "points elsewhere" in difference(model, engine, engine, text)

    def longer(*arguments, wants_x, _true=linear.backward):
        d_x, d_a, d_b = _true(*arguments, wants_x=wants_x)
        return d_x, None if d_a is None else 1.3 * d_a, d_b

    monkeypatch.setattr(linear, "backward", longer)
    assert "times as large" in difference(model, engine, engine, text)
