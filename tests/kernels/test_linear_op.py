"""A linear layer with its adapter as a fused op: values and gradients of the formula under autograd, in fp32."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.library import opcheck

from job.kernels import linear_op as layer_op
from job.kernels import reference
from job.kernels.linear import masks_of
from job.kernels.weights import Adapter, Linear, Quantised

T, K, N, RANK, RATE = 6, 64, 48, 4, 0.3


def quantised(weight):
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return Quantised(
        packed=packed.reshape(-1),
        scales=state.absmax,
        scales_code=state.state2.code,
        outer_scales=state.state2.absmax,
        offset=state.offset.reshape(1),
        code=state.code,
        height=N,
        width=K,
    )


def layer_of(*, four_bits=True, bias=True, adapter=True):
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    made = Adapter(
        a=nn.Parameter(torch.randn(RANK, K)), b=nn.Parameter(torch.randn(N, RANK)), scaling=0.5, dropout=RATE
    )
    return Linear(
        weight=quantised(weight) if four_bits else weight,
        bias=torch.randn(N) if bias else None,
        adapter=made if adapter else None,
    )


def values(layer):
    if not isinstance(layer.weight, Quantised):
        return layer.weight
    out = torch.empty(N, K)
    reference.dequantise(layer.weight, out)
    return out


def formula(x, layer, seed):
    y = nn.functional.linear(x, values(layer), layer.bias)
    if layer.adapter is None:
        return y
    masks, mask = masks_of(layer.adapter, seed), torch.ones_like(x)
    if masks is not None:
        mask = reference.kept(torch.Size((T, K)), masks, 0).view_as(x) / (1 - RATE)
    return y + layer.adapter.scaling * (x * mask) @ layer.adapter.a.T @ layer.adapter.b.T


@pytest.mark.parametrize(
    "kind", [{}, {"four_bits": False}, {"bias": False}, {"adapter": False}, {"adapter": False, "four_bits": False}]
)
@pytest.mark.parametrize("seed", [None, torch.tensor([7])])
def test_values_and_gradients_are_the_formula_s(kind, seed):
    layer = layer_of(**kind)
    x = torch.randn(2, T // 2, K, requires_grad=True)
    learning = [x, *([layer.adapter.a, layer.adapter.b] if layer.adapter else [])]
    found, expected = layer_op.linear(x, layer, seed), formula(x, layer, seed)
    grad = torch.randn_like(expected)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(expected, learning, grad)
    for gradient, other in zip(torch.autograd.grad(found, learning, grad), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-4)


def test_an_input_that_nobody_learns_from_gets_no_gradient():
    layer = layer_of()
    layer_op.linear(torch.randn(T, K), layer, None).sum().backward()

    assert layer.adapter.a.grad.any()
    assert layer.adapter.b.grad.any()


def test_the_adapter_s_gradients_are_summed_in_fp32_when_its_inputs_are_not():
    layer = layer_of()
    x = torch.randn(T, K, dtype=torch.bfloat16, requires_grad=True)
    y = layer_op.linear(x, layer, None)
    y.sum().backward()

    assert y.dtype is x.grad.dtype is torch.bfloat16
    assert layer.adapter.a.grad.dtype is torch.float32
    assert not torch.equal(layer.adapter.a.grad, layer.adapter.a.grad.bfloat16().float())


def test_what_a_young_adapter_adds_is_not_lost_in_rounding():
    layer = layer_of(bias=False)
    with torch.no_grad():
        layer.adapter.b.copy_(layer.adapter.b.sign() * 1e-3)  # as after the first steps, all of them small
    x = torch.randn(512, K, dtype=torch.bfloat16)
    base = x.float() @ values(layer).bfloat16().float().T
    adds = layer.adapter.scaling * x.float() @ layer.adapter.a.T @ layer.adapter.b.T

    def arrives(y, without):
        return float(((y.float() - without) * adds).sum() / (adds * adds).sum())

    found, adds = layer_op.linear(x, layer, None).detach(), adds.detach()
    rounded = base.bfloat16()
    assert arrives(found, base) == pytest.approx(1, abs=0.1)
    assert arrives(rounded + adds.bfloat16(), rounded.float()) < 0.7  # added to what is rounded already: PEFT's order


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("four_bits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_pass_torch_s_opcheck(adapter, four_bits, dtype):
    layer, x = layer_of(adapter=adapter, four_bits=four_bits), torch.randn(T, K, dtype=dtype, requires_grad=True)
    weight, scales = layer.weight, []
    if four_bits:
        scales = [weight.scales, weight.scales_code, weight.outer_scales, weight.offset, weight.code]
        weight = weight.packed
    a, b = (layer.adapter.a, layer.adapter.b) if adapter else (None, None)
    seed = torch.tensor([7]) if adapter else None
    facts = (weight, scales, layer.bias, a, b, seed, 0.5, RATE, N)
    opcheck(layer_op._forward_op, (x, *facts))

    x, *learning = (None if each is None else each.detach() for each in (x, a, b))  # it has no backward of its own
    y, h = (each.detach() for each in layer_op._forward_op(x, *facts))
    for wants_x in (True, False) if adapter else (True,):  # without an adapter nothing else is asked for
        opcheck(layer_op._backward_op, (y, x, h, weight, scales, *learning, seed, 0.5, RATE, N, wants_x))
