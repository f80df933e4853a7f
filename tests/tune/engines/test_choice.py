"""The generic engine has our fused linear layers and loss only where they agree with PEFT's own."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs
from tiny import ARCHITECTURES, EVERY_LINEAR, adapted, backward, gradients, micro_batch

from job.core.recipe.schema import LoraSection
from job.kernels import linear as layer
from job.tune.engines import choice, loss
from job.tune.engines.choice import choose_engine
from job.tune.engines.selftest import check_model
from job.tune.model.adapter import trainable


def model_of(bases, architecture="llama", *, dtype=torch.float32, dropout=0.0):
    targets = EVERY_LINEAR if architecture == "llama" else "all-linear"
    lora = LoraSection(r=4, alpha=8, dropout=dropout, targets=targets)
    return adapted(bases[architecture], lora, dtype=dtype, moved=True)


def chosen(model, wanted="generic"):
    return choose_engine(model, wanted, backward=torch.Tensor.backward)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_keeps_our_ops_in_bf16_and_is_left_as_it_was(bases, architecture):
    model = model_of(bases, architecture, dtype=torch.bfloat16, dropout=0.1)
    model.train()
    before, state = [parameter.clone() for parameter in trainable(model)], torch.get_rng_state()
    made = chosen(model)

    assert (made.name, made.compiled, bool(model.linears)) == ("generic", False, True)
    assert made.reason == "asked for; layers not compiled: not on a GPU"
    assert all(torch.equal(parameter, old) for parameter, old in zip(trainable(model), before, strict=True))
    assert all(parameter.grad is None for parameter in trainable(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def another_gradient(*arguments, wants_x, times=1.3, _true=layer.backward):
    """Right but for its scale."""
    d_x, d_a, d_b = _true(*arguments, wants_x=wants_x)
    return d_x, None if d_a is None else times * d_a, d_b


def another_result(*arguments, _true=layer.forward):
    y, h = _true(*arguments)
    return 1.5 * y, h


def no_gradient(*arguments, weight_per_target, seed, _true=loss.head_loss):
    return replace(_true(*arguments, weight_per_target=weight_per_target, seed=seed), a=None)


def no_kernel(*_, **__):
    msg = "no kernel here"
    raise RuntimeError(msg)


def another_head(*arguments, weight_per_target, seed, _true=loss.head_loss):
    return _true(*arguments, weight_per_target=2 * weight_per_target, seed=seed)


@pytest.mark.parametrize("wanted", ["auto", "generic"])
@pytest.mark.parametrize(
    ("module", "part", "wrong", "told"),
    [
        (layer, "forward", another_result, "a token's loss differs"),
        (layer, "backward", another_gradient, "the gradient of model"),
        (layer, "backward", no_kernel, "RuntimeError: no kernel here"),
        (loss, "head_loss", another_head, "the gradient of model"),
        (loss, "head_loss", no_gradient, "model.base_model.model.lm_head.lora_A.default.weight gets no gradient"),
    ],
)
def test_ops_that_compute_something_else_are_left_for_peft_s_own(
    bases, documents, monkeypatch, wanted, module, part, wrong, told
):
    """They stay wrong here: whatever is right afterwards went past them, the head's loss included."""
    model, batch = model_of(bases), micro_batch(documents, range(3))
    with model.linears.as_peft_has_them():
        expected = backward(model, [batch])
    monkeypatch.setattr(module, part, wrong)
    check_model(model)  # of the architecture it has nothing to say
    with capture_logs() as logs:
        made = chosen(model, wanted)
    (warning,) = logs
    losses = made.engine.accumulate(batch, targets=1, seed=0)
    found = gradients(model)

    assert warning["event"] == "linear_layers_left_to_peft"
    assert warning["reason"].startswith(told)
    assert f"; linear layers are PEFT's own: {told}" in made.reason
    assert float(losses.sum()) == pytest.approx(expected[0], rel=1e-5)
    assert found.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_a_model_left_to_peft_still_answers_and_is_not_compared_twice(bases, documents, monkeypatch):
    model, batch = model_of(bases), micro_batch(documents, range(3))
    before = model(batch)
    model.linears.leave_to_peft()
    monkeypatch.setattr(layer, "forward", no_kernel)
    with model.generating(), model.linears.as_peft_has_them():
        pass

    torch.testing.assert_close(model(batch), before)
    assert "PEFT" not in chosen(model).reason


def test_peft_s_own_layers_within_peft_s_own_layers(bases, documents, monkeypatch):
    model, batch = model_of(bases), micro_batch(documents, range(3))
    before = model(batch)
    used = []
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda *arguments: used.append(1))
        with model.linears.as_peft_has_them():
            with model.linears.as_peft_has_them():
                torch.testing.assert_close(model(batch), before)
            torch.testing.assert_close(model(batch), before)

    assert used == []
    assert "fused" in vars(model.model.get_base_model().lm_head)
    with model.linears.as_peft_has_them():
        model.linears.leave_to_peft()  # as where it is found out meanwhile
    assert "fused" not in vars(model.model.get_base_model().lm_head)


def test_peft_s_own_layers_are_not_compiled():
    gpu = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(
        parameters=lambda: iter([gpu]), is_packed=True, kernels_by_borders=(), layers=True, linears=False
    )

    assert choice._reason_against_compiling(model) == "their linear layers are PEFT's own"
