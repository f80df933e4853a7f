"""The elementwise parts and their gradients, against formulas of torch and autograd: fp32, small."""

import bitsandbytes as bnb
import pytest
import torch
from torch.nn.functional import cross_entropy, rms_norm, silu

from job.engine import reference
from job.engine.weights import Quantised

T, K = 5, 32
EPSILON = 1e-5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 64), (48, 192), (130, 256)])
def test_nf4_is_decoded_as_bitsandbytes_does(shape):
    weight = torch.randn(shape)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    quantised = Quantised(
        packed=packed.reshape(-1),
        scales=state.absmax,
        scales_code=state.state2.code,
        outer_scales=state.state2.absmax,
        offset=state.offset.reshape(1),
        code=state.code,
        height=shape[0],
        width=shape[1],
    )
    wide = torch.full((shape[0], shape[1] + 64), 7.0)
    reference.decode(quantised, wide[:, : shape[1]])

    close(wide[:, : shape[1]], bnb.functional.dequantize_4bit(packed, state))
    assert bool((wide[:, shape[1] :] == 7).all())


def test_the_norm_and_its_gradient():
    x, weight, grad = torch.randn(T, K, requires_grad=True), torch.rand(K) + 0.5, torch.randn(T, K)
    expected = rms_norm(x, (K,), weight, EPSILON)
    expected.backward(grad)
    out, inverse, into = torch.empty(T, K), torch.empty(T), torch.ones(T, K)
    reference.rms_forward(x.detach(), weight, out, inverse, EPSILON)
    reference.rms_backward_add(grad, out, weight, inverse, into)

    close(out, expected.detach())
    close(into, 1 + x.grad)


@pytest.mark.parametrize("normed", [False, True])
def test_the_rotation_and_its_gradient(normed):
    heads, width = 3, 16
    x, grad = torch.randn(T, heads, width, requires_grad=True), torch.randn(T, heads, width)
    angle = torch.randn(T, width // 2)
    cos, sin = angle.cos(), angle.sin()
    weight = torch.rand(width) + 0.5 if normed else None
    inverse = torch.empty(T, heads) if normed else None
    plain = rms_norm(x, (width,), weight, EPSILON) if normed else x
    half = torch.cat([-plain[..., width // 2 :], plain[..., : width // 2]], dim=-1)
    both = torch.cat([cos, cos], dim=-1)[:, None], torch.cat([sin, sin], dim=-1)[:, None]
    expected = plain * both[0] + half * both[1]
    expected.backward(grad)

    rotated, out = x.detach().clone(), torch.empty(T, heads, width)
    reference.rotate_forward(rotated, cos, sin, weight, inverse, EPSILON)
    reference.rotate_backward(grad, rotated, cos, sin, weight, inverse, out)

    close(rotated, expected.detach())
    close(out, x.grad)


def test_the_gated_activation_and_its_gradient():
    gate_up, grad = torch.randn(T, 2 * K, requires_grad=True), torch.randn(T, K)
    expected = silu(gate_up[:, :K]) * gate_up[:, K:]
    expected.backward(grad)
    out, again, into = torch.empty(T, K), torch.empty(T, K), torch.full((T, 2 * K + 4), 7.0)
    reference.swiglu_forward(gate_up.detach(), out)
    reference.swiglu_backward(gate_up.detach(), grad, into, again)

    close(out, expected.detach())
    close(again, out)
    close(into[:, : 2 * K], gate_up.grad)
    assert bool((into[:, 2 * K :] == 7).all())


def test_the_loss_and_its_gradient():
    logits, targets = torch.randn(T, K, requires_grad=True), torch.randint(0, K, (T,))
    expected = cross_entropy(logits, targets, reduction="none")
    (0.25 * expected.sum()).backward()
    losses, there = torch.empty(T), logits.detach().clone()
    reference.cross_entropy_in_place(there, targets, losses, 0.25)

    close(losses, expected.detach())
    close(there, logits.grad)


def test_dropout_keeps_its_share_and_its_mask():
    x, out, again, into = torch.ones(200, 50), *(torch.empty(200, 50) for _ in range(2)), torch.ones(200, 50)
    reference.dropout(x, out, 11, 0.25)
    reference.dropout(x, again, 12, 0.25)
    reference.dropout_backward_add(x, into, 11, 0.25)

    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert float((out > 0).float().mean()) == pytest.approx(0.75, abs=0.03)
    assert not torch.equal(out, again)
    close(into, 1 + out)
