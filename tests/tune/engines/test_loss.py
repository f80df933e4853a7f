"""The chunked cross-entropy is the plain one, in value and gradient, adapter on the head included."""

from itertools import accumulate

import pytest
import torch
from tiny import adapted, backward, gradients, micro_batch
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from job.core.plan.memory import _LOGITS_BY_AUTOGRAD, _LOGITS_BYTES, _LOGITS_CHUNK
from job.core.recipe.schema import LoraSection
from job.kernels import head_loss as head
from job.kernels.weights import Linear
from job.tune.engines import loss as loss_module
from job.tune.engines.loss import CHUNK_TARGETS, Head, summed_loss, token_losses, token_scores


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [4, 11, 1024])
def test_chunks_change_neither_losses_nor_gradients(softcap, chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_TARGETS", chunk)
    torch.manual_seed(0)
    hidden, ids = torch.randn(11, 8, requires_grad=True), torch.randint(0, 20, (11,))
    linear = torch.nn.Linear(8, 20)

    plain_logits = linear(hidden) * 3.0
    if softcap is not None:
        plain_logits = softcap * torch.tanh(plain_logits / softcap)
    plain = cross_entropy(plain_logits, ids, reduction="none")
    weights = torch.rand(11)
    expected = torch.autograd.grad((plain * weights).sum(), [hidden, linear.weight, linear.bias])

    scaled = Head(module=linear, softcap=softcap, scale=3.0)
    ours = token_losses(hidden, ids, scaled)
    found = torch.autograd.grad((ours * weights).sum(), [hidden, linear.weight, linear.bias])
    torch.testing.assert_close(ours, plain)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(token_scores(hidden, ids, scaled)[0], plain)
    assert torch.equal(token_scores(hidden, ids, scaled)[1], plain_logits.argmax(-1) == ids)


def test_chunks_change_no_gradient_of_a_whole_model(any_model, documents, monkeypatch):
    batch = micro_batch(documents, range(len(documents)))
    any_model.eval()
    whole = backward(any_model, [batch])
    monkeypatch.setattr(loss_module, "CHUNK_TARGETS", 9)
    chunked = backward(any_model, [batch])
    assert chunked[0] == pytest.approx(whole[0], rel=1e-6)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(chunked[1][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))


def test_at_most_a_chunk_of_logits_exists_at_once(llama, documents, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_TARGETS", 9)
    rows, linear = [], loss_module.linear

    def counted(hidden, *others):
        rows.append(len(hidden))
        return linear(hidden, *others)

    monkeypatch.setattr(loss_module, "linear", counted)
    batch = micro_batch(documents, range(len(documents)))
    backward(llama, [batch])
    assert max(rows) == 9
    assert sum(rows) == 2 * batch.targets  # in the forward, and recomputed in the backward; no other token is projected


def both_ways(model, batch):
    """Gradients of the mean loss: with logits computed once, and by autograd through the head."""
    total, losses = model.summed_loss(batch, weight_per_target=1 / batch.targets)
    total.backward()
    once = losses, gradients(model)
    plain = model(batch)
    plain.mean().backward()
    return once, (plain, gradients(model))


@pytest.mark.parametrize("at_once", [2**27, 7 * 300])
def test_logits_computed_once_give_autograd_s_losses_and_gradients(any_model, documents, monkeypatch, at_once):
    """With an adapter on the head, with bounds on the logits (Gemma 2), in one chunk and in many."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", at_once)
    any_model.eval()
    once, plain = both_ways(any_model, micro_batch(documents, range(len(documents))))

    torch.testing.assert_close(*(losses for losses, _ in (once, plain)), rtol=1e-5, atol=1e-5)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(once[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_a_tied_head_without_an_adapter_needs_none(tied_base, documents):
    model = adapted(tied_base, LoraSection(r=4, targets=("q_proj",)), moved=True)
    once, plain = both_ways(model, micro_batch(documents, range(3)))

    for name, gradient in plain[1].items():
        torch.testing.assert_close(once[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def held(run):
    """Most bytes that were there at once beyond those before."""
    run()  # once before, for what is kept for good
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())))


@pytest.mark.parametrize(
    ("kind", "softcap", "scale"), [("capped", 30.0, 1.0), ("capped", 30.0, 0.5), ("scaled", None, 0.5)]
)
def test_the_memory_plan_knows_what_autograd_holds_of_logits(kind, softcap, scale):
    vocabulary, width, targets = 8000, 16, 2 * CHUNK_TARGETS
    weight = torch.randn(vocabulary, width).bfloat16()
    layer = Linear(weight=weight, bias=None, adapter=None)
    bounded = Head(module=None, softcap=softcap, scale=scale, layer=layer)
    hidden = torch.randn(targets, width).bfloat16().requires_grad_()
    ids = torch.randint(0, vocabulary, (targets,))
    planned = _LOGITS_BY_AUTOGRAD[kind] * _LOGITS_CHUNK * vocabulary

    def run():
        summed_loss(hidden, ids, bounded, weight_per_target=1.0)[0].backward()

    assert held(run) == pytest.approx(planned, rel=0.02)


def test_the_memory_plan_knows_what_a_plain_head_holds():
    assert torch.bfloat16.itemsize * head.LOGITS_AT_ONCE == _LOGITS_BYTES


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_chunks_drop_by_masks_of_their_own(bases, documents, monkeypatch, scale):
    model = adapted(bases["llama"], LoraSection(r=4, dropout=0.5, targets=("lm_head",)), moved=True)
    model.model.get_base_model().config.logit_scale = scale
    batch = micro_batch(documents, [1, 1])
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 300 * batch.target_counts[0])
    monkeypatch.setattr(loss_module, "CHUNK_TARGETS", batch.target_counts[0])
    model.train()
    model.seed_dropout(1)
    with torch.no_grad():
        first, second = model.summed_loss(batch, weight_per_target=1.0)[1].chunk(2)

    assert not torch.equal(first, second)
