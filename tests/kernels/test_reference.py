"""The ops and their gradients, against formulas of torch and autograd: fp32, small."""

import bitsandbytes as bnb
import pytest
import torch
from torch.nn.functional import cross_entropy, rms_norm, silu

from job.kernels import reference
from job.kernels.ops import Masks
from job.kernels.weights import Quantised

T, K = 5, 32
EPSILON = 1e-5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 64), (48, 192), (130, 256), (64, 172)])
def test_nf4_is_dequantised_as_by_bitsandbytes(shape):
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
    reference.dequantise(quantised, wide[:, : shape[1]])

    close(wide[:, : shape[1]], bnb.functional.dequantize_4bit(packed, state))
    assert bool((wide[:, shape[1] :] == 7).all())


def test_the_norm_and_its_gradient():
    x, weight, grad = torch.randn(T, K, requires_grad=True), torch.rand(K) + 0.5, torch.randn(T, K)
    expected = rms_norm(x, (K,), weight, EPSILON)
    expected.backward(grad)
    out, rstd, into = torch.empty(T, K), torch.empty(T), torch.ones(T, K)
    reference.rms_forward(x.detach(), weight, out, rstd, EPSILON)
    reference.rms_backward_add(grad, out, weight, rstd, into)

    close(out, expected.detach())
    close(into, 1 + x.grad)


@pytest.mark.parametrize("normed", [False, True])
def test_the_rotation_and_its_gradient(normed):
    heads, width = 3, 16
    x, grad = torch.randn(T, heads, width, requires_grad=True), torch.randn(T, heads, width)
    angle = torch.randn(T, width // 2)
    cos, sin = angle.cos(), angle.sin()
    weight = torch.rand(width) + 0.5 if normed else None
    rstd = torch.empty(T, heads) if normed else None
    plain = rms_norm(x, (width,), weight, EPSILON) if normed else x
    half = torch.cat([-plain[..., width // 2 :], plain[..., : width // 2]], dim=-1)
    both = torch.cat([cos, cos], dim=-1)[:, None], torch.cat([sin, sin], dim=-1)[:, None]
    expected = plain * both[0] + half * both[1]
    expected.backward(grad)

    rotated, out = x.detach().clone(), torch.empty(T, heads, width)
    reference.rotate_forward(rotated, cos, sin, weight, rstd, EPSILON)
    reference.rotate_backward(grad, rotated, cos, sin, weight, rstd, out)

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
    targets[2] = -1  # no target
    expected = cross_entropy(logits, targets, reduction="none", ignore_index=-1)
    (0.25 * expected.sum()).backward()
    losses, there = torch.empty(T), logits.detach().clone()
    reference.cross_entropy_in_place(there, targets, losses, torch.tensor([0.25]))

    close(losses, expected.detach())
    close(there, logits.grad)


def masks_of(seed, *, rate=0.25, adapters=3, site=5):
    return Masks(seed=torch.tensor([seed]), site=site, adapters=adapters, rate=rate)


SHAPE = torch.Size((400, 300))


@pytest.mark.parametrize("rate", [0.05, 0.25])
def test_a_mask_keeps_its_share_everywhere(rate):
    kept = reference.kept(SHAPE, masks_of(11, rate=rate), 0).float()

    assert float(kept.mean()) == pytest.approx(1 - rate, abs=0.005)
    for axis in (0, 1):
        assert float(kept.mean(dim=axis).min()) > 1 - rate - 0.13


def test_masks_have_nothing_to_do_with_each_other():
    """Masks of other seeds, sites and adapters, and neighbours in one mask."""
    first = reference.kept(SHAPE, masks_of(11), 0).float() - 0.75
    others = [
        reference.kept(SHAPE, masks_of(12), 0),
        reference.kept(SHAPE, masks_of(11, site=6), 0),
        reference.kept(SHAPE, masks_of(11), 1),
        *(first.roll(shift, dims=axis) + 0.75 for shift in (1, 2, 8, 64, 128) for axis in (0, 1)),
    ]
    for other in others:
        correlation = float((first * (other.float() - 0.75)).mean()) / (0.25 * 0.75)
        assert abs(correlation) < 0.015
    assert torch.equal(first, reference.kept(SHAPE, masks_of(11), 0).float() - 0.75)


def test_what_goes_through_masks_is_dropout_s_gradient():
    """One adapter's product and its gradients, against autograd through the same mask."""
    masks, rank = masks_of(3, adapters=2), 4
    x, a = torch.randn(T, K, requires_grad=True), torch.randn(2 * rank, K, requires_grad=True)
    dropped = [torch.where(reference.kept(x.shape, masks, n), x, 0.0) / 0.75 for n in range(2)]
    expected = torch.cat([part @ rows.t() for part, rows in zip(dropped, a.chunk(2), strict=True)], dim=1)
    thin = torch.randn(T, 2 * rank)
    expected.backward(thin)
    out, into = torch.empty(T, 2 * rank), torch.ones(T, K)
    reference.masked_ranks(x.detach(), a.detach(), out, masks)
    reference.masked_add(thin, a.detach(), into, masks)

    close(out, expected.detach())
    close(into, 1 + x.grad)
    close(reference.masked_gradient(thin, x.detach(), masks), a.grad)
