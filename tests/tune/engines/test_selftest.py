"""The start-up checks: healthy models pass, and each thing that has failed silently elsewhere ends the job."""

from dataclasses import replace

import pytest
import torch
from tiny import adapted, micro_batch
from transformers import AttentionInterface

from job.core.errors import UsageError
from job.core.recipe import LoraSection
from job.tune.engines import loss
from job.tune.engines.attention import PER_DOCUMENT, per_document_attention, register
from job.tune.engines.selftest import check_model


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


def test_an_adapter_that_learns_nothing_is_found(model, monkeypatch):
    """As where a loss reads the head's weight and so passes by its adapter."""

    def by_the_weight(hidden, targets, head, _true=loss.token_losses):
        return _true(hidden, targets, replace(head, module=head.module.base_layer))

    monkeypatch.setattr(loss, "token_losses", by_the_weight)
    with pytest.raises(UsageError, match=r"no gradient reaches .*lm_head.*lora_B"):
        check_model(model)


def test_attention_masks_and_sinks_are_refused(llama):
    q = torch.zeros(1, 4, 3, 16)
    for extra in ({"attention_mask": torch.zeros(1, 1, 3, 3)}, {"attention_mask": None, "s_aux": torch.zeros(4)}):
        with pytest.raises(UsageError, match="packing does not support"):
            per_document_attention(llama, q, q, q, document_cu_seqlens=None, document_lengths=None, **extra)
