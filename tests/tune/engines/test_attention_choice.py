"""Our own attention kernels run where they were measured to be faster and agree with the formula, else torch's."""

from types import SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs

from job.tune.engines import attention_choice
from job.tune.engines.attention_choice import AttentionChoice, choose_attention, difference_from_formula

OWN = AttentionChoice(own=True, reason=None)
CUDA = torch.device("cuda")


def config_with(**config):
    return SimpleNamespace(**{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, **config})


@pytest.fixture
def hopper(monkeypatch):
    """In place of a GPU: the list of what kernels are tried with on it."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(attention_choice, "has_triton", lambda: True)
    monkeypatch.setattr(attention_choice, "difference_from_formula", lambda _device, **heads: asked.append(heads))
    attention_choice._tried.cache_clear()
    yield asked
    attention_choice._tried.cache_clear()


def test_attention_is_our_own_where_it_was_measured_to_be_faster_and_tried_once(hopper):
    assert choose_attention(config_with(), CUDA) == OWN
    assert choose_attention(config_with(), CUDA) == OWN
    assert hopper == [{"heads": 4, "key_heads": 2, "width": 64, "sinks": False}]


def test_heads_that_a_config_does_not_name_are_worked_out(hopper):
    assert choose_attention(config_with(head_dim=None, num_key_value_heads=None, hidden_size=128), CUDA) == OWN
    assert hopper == [{"heads": 4, "key_heads": 4, "width": 32, "sinks": False}]


def test_attention_with_sinks_is_tried_with_them(hopper):
    assert choose_attention(config_with(), CUDA, sinks=True) == OWN
    assert choose_attention(config_with(), CUDA) == OWN
    assert [asked["sinks"] for asked in hopper] == [True, False]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"head_dim": 96}, "heads are 96 wide, and our kernels take 16, 32, 64, 128"),
        ({"num_attention_heads": None}, "its config does not name the number of heads"),
        ({"attn_logit_softcapping": 50.0}, "its attention scores are capped"),
    ],
)
def test_attention_that_our_kernels_do_not_take_is_torch_s(hopper, config, told):
    assert choose_attention(config_with(**config), CUDA) == AttentionChoice(own=False, reason=told)
    assert hopper == []


def test_attention_is_torch_s_where_ours_was_not_measured(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    found = choose_attention(config_with(), CUDA)

    assert found.own is False
    assert found.reason == "our kernels were measured on compute capability 9.x, and this is 8.9"


def test_attention_is_torch_s_without_triton(hopper, monkeypatch):
    monkeypatch.setattr(attention_choice, "has_triton", lambda: False)

    assert choose_attention(config_with(), CUDA) == AttentionChoice(own=False, reason="Triton is not installed")


def no_kernel(*_, **__):
    msg = "no kernel here"
    raise RuntimeError(msg)


@pytest.mark.parametrize(
    ("tried", "told"),
    [
        (lambda *_, **__: "the result differs by 9.0%", "the result differs"),
        (no_kernel, "RuntimeError: no kernel here"),
    ],
)
def test_attention_that_differs_or_does_not_compile_is_torch_s_and_logged_once(hopper, monkeypatch, tried, told):
    monkeypatch.setattr(attention_choice, "difference_from_formula", tried)
    with capture_logs() as logs:
        found = [choose_attention(config_with(), CUDA) for _ in range(2)]

    (warning,) = logs
    assert warning["event"] == "attention_left_to_torch"
    assert warning["reason"].startswith(told)
    assert found == [AttentionChoice(own=False, reason=warning["reason"])] * 2


def test_on_the_cpu_no_reason_is_given():
    assert choose_attention(config_with(), torch.device("cpu")) == AttentionChoice(own=False, reason=None)


# --- what the kernels give, tried with others in their place ---------------------------------------------------------


HEADS = {"heads": 4, "key_heads": 2, "width": 16}


def test_our_attention_kernels_pass_where_they_agree_with_the_formula(own_kernels):
    assert difference_from_formula(torch.device("cpu"), **HEADS) is None
    assert own_kernels.sinks is None
    assert difference_from_formula(torch.device("cpu"), **HEADS, sinks=True) is None
    assert len(own_kernels.sinks) == HEADS["heads"]


def longer_window(forward):
    return lambda query, key, value, blocks, scale, window, sinks: forward(
        query, key, value, blocks, scale, window and 400, sinks
    )


def other_scale(forward):
    return lambda query, key, value, blocks, scale, window, sinks: forward(
        query, key, value, blocks, 1.1 * scale, window, sinks
    )


def one_document(forward):
    """Each block sees the documents before its own."""

    def across(query, key, value, blocks, scale, window, sinks):
        whole = torch.tensor([[0, first, len(query)] for first in range(0, len(query), 64)], dtype=blocks.dtype)
        return forward(query, key, value, whole, scale, window, sinks)

    return across


@pytest.mark.parametrize("wrong", [longer_window, other_scale, one_document])
def test_another_attention_is_found(own_kernels, wrong):
    own_kernels.forward = wrong(own_kernels.forward)

    assert "the result differs by" in difference_from_formula(torch.device("cpu"), **HEADS)


def test_kernels_that_leave_sinks_out_are_found(own_kernels):
    right = own_kernels.forward
    own_kernels.forward = lambda *given: right(*given[:-1], None)

    assert difference_from_formula(torch.device("cpu"), **HEADS) is None
    assert "the result differs by" in difference_from_formula(torch.device("cpu"), **HEADS, sinks=True)


@pytest.mark.parametrize(("place", "name"), [(0, "query"), (1, "key"), (2, "value")])
@pytest.mark.parametrize("value", [1.1, float("nan")])
def test_another_gradient_of_attention_is_found(own_kernels, place, name, value):
    right = own_kernels.backward

    def wrong(*arguments):
        right(*arguments)
        arguments[-1][place][-3:].mul_(10 * value)

    own_kernels.backward = wrong

    assert f"the gradient of the {name} differs by" in difference_from_formula(torch.device("cpu"), **HEADS)
