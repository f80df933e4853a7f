"""The generic path is taken with the engine's ops only where they give what PEFT's own layers give."""

from types import SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs
from tiny import ARCHITECTURES, EVERY_LINEAR, adapted, backward, gradients, micro_batch

from job.core.recipe import LoraSection
from job.engine import layer
from job.tune import choice, loss
from job.tune.choice import choose_path
from job.tune.model import trainable


def model_of(bases, architecture="llama", *, dtype=torch.float32, dropout=0.0):
    targets = EVERY_LINEAR if architecture == "llama" else "all-linear"
    lora = LoraSection(r=4, alpha=8, dropout=dropout, targets=targets)
    return adapted(bases[architecture], lora, dtype=dtype, moved=True)


def chosen(model, wanted="generic"):
    return choose_path(model, wanted, backward=torch.Tensor.backward, on_stopped=print)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_keeps_the_engine_s_ops_in_bf16_and_is_left_as_it_was(bases, architecture):
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


def another_gradient(*arguments, wants_x, _true=layer.backward):
    d_x, d_a, d_b = _true(*arguments, wants_x=wants_x)
    return d_x, None if d_a is None else 2 * d_a, d_b


def no_kernel(*_, **__):
    msg = "no kernel here"
    raise RuntimeError(msg)


def another_head(*arguments, share, seed, _true=loss.head_loss):
    return _true(*arguments, share=2 * share, seed=seed)


@pytest.mark.parametrize("wanted", ["auto", "generic"])
@pytest.mark.parametrize(
    ("module", "part", "wrong", "told"),
    [
        (layer, "backward", another_gradient, "the gradient of model"),
        (layer, "backward", no_kernel, "RuntimeError: no kernel here"),
        (loss, "head_loss", another_head, "the gradient of model"),
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
    with capture_logs() as logs:
        made = chosen(model, wanted)
    (warning,) = logs
    losses = made.path.accumulate(batch, targets=1)
    found = gradients(model)

    assert warning["event"] == "linear_layers_left_to_peft"
    assert warning["reason"].startswith(told)
    assert f"; linear layers are PEFT's own: {told}" in made.reason
    assert float(losses.sum()) == pytest.approx(expected[0], rel=1e-5)
    assert found.keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_a_model_left_to_peft_still_answers_and_is_not_looked_at_again(bases, documents, monkeypatch):
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
    assert "one_op" in vars(model.model.get_base_model().lm_head)
    with model.linears.as_peft_has_them():
        model.linears.leave_to_peft()  # as where it is found out meanwhile
    assert "one_op" not in vars(model.model.get_base_model().lm_head)


def test_peft_s_own_layers_are_not_compiled():
    gpu = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(parameters=lambda: iter([gpu]), layers=True, linears=False)

    assert choice._reason_against_compiling(model) == "their linear layers are PEFT's own"


# --- attention -------------------------------------------------------------------------------------------------------


def on_a_gpu(**config):
    """What is asked of a model before its attention is chosen."""
    found = SimpleNamespace(**{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, **config})
    return SimpleNamespace(
        parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]),
        model=SimpleNamespace(get_base_model=lambda: SimpleNamespace(config=found)),
        own_attention=None,
    )


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    asked = []
    monkeypatch.setattr(choice, "attention_difference", lambda _device, **heads: asked.append(heads))
    return asked


def test_attention_is_the_engine_s_own_where_it_is_known_to_win(hopper):
    model = on_a_gpu()

    assert choice._choose_attention(model) == ""
    assert model.own_attention is True
    assert hopper == [{"heads": 4, "key_heads": 2, "width": 64}]


def test_heads_that_a_config_does_not_tell_of_are_worked_out(hopper):
    choice._choose_attention(on_a_gpu(head_dim=None, num_key_value_heads=None, hidden_size=128))

    assert hopper == [{"heads": 4, "key_heads": 4, "width": 32}]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"head_dim": 96}, "heads are 96 wide, and the engine's take 16, 32, 64, 128"),
        ({"attn_logit_softcapping": 50.0}, "its attention scores are capped"),
    ],
)
def test_attention_that_the_engine_s_kernels_do_not_take_is_torch_s(hopper, config, told):
    model = on_a_gpu(**config)

    assert choice._choose_attention(model) == f"; attention by torch's kernels: {told}"
    assert model.own_attention is False
    assert hopper == []


def test_attention_is_torch_s_where_the_engine_s_was_not_measured(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    model = on_a_gpu()

    assert choice._choose_attention(model).endswith("measured on compute capability 9.x, and this is 8.9")
    assert model.own_attention is False


@pytest.mark.parametrize("failing", [lambda *_, **__: "the result differs by 9.0%", no_kernel])
def test_attention_that_differs_or_does_not_compile_is_torch_s_and_said(hopper, monkeypatch, failing):
    monkeypatch.setattr(choice, "attention_difference", failing)
    model = on_a_gpu()
    with capture_logs() as logs:
        said = choice._choose_attention(model)

    (warning,) = logs
    assert warning["event"] == "attention_left_to_torch"
    assert said == f"; attention by torch's kernels: {warning['reason']}"
    assert model.own_attention is False


def test_on_the_cpu_nothing_is_said_of_attention(bases):
    model = model_of(bases)

    assert choice._choose_attention(model) == ""
    assert model.own_attention is False
