"""A layer's experts as one op: a loop over tokens under autograd, where one gets no token, or all of them."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from job.kernels import experts as grouped
from job.kernels import reference
from job.kernels.experts import Experts, ExpertsAdapter, ExpertsLinear, Rows, experts
from job.kernels.ops import Gate
from job.kernels.weights import QuantisedExperts

T, CHOSEN, E, HIDDEN, INNER, RANK = 11, 2, 5, 64, 128, 3


def quantised(matrices):
    """[E, N, K], each by itself."""
    parts = [
        bnb.functional.quantize_4bit(each.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
        for each in matrices
    ]
    states = [state for _, state in parts]
    return QuantisedExperts(
        packed=torch.stack([packed.reshape(-1) for packed, _ in parts]),
        scales=torch.stack([state.absmax for state in states]),
        scales_code=states[0].state2.code,
        outer_scales=torch.stack([state.state2.absmax for state in states]),
        offsets=torch.stack([state.offset for state in states]),
        code=states[0].code,
        height=matrices.shape[1],
        width=matrices.shape[2],
    )


def swiglu(z):
    gate, up = z.chunk(2, dim=-1)
    return silu(gate) * up


def clamped(z):
    """gpt-oss's: interleaved, clamped, with one more."""
    gate, up = z[..., ::2].clamp(max=1.0), z[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.7)


def linear_of(height, width, *, bias, adapter):
    made = ExpertsAdapter(
        a=nn.Parameter(torch.randn(E * RANK, width) / 8),
        b=nn.Parameter(torch.randn(height, RANK * E) / 8),
        scaling=0.5,
    )
    return ExpertsLinear(
        weights=quantised(torch.randn(E, height, width) / 8),
        bias=torch.randn(E, height) if bias else None,
        adapter=made if adapter else None,
    )


def layer_of(*, gate=swiglu, bias=False, adapters=(True, True)):
    torch.manual_seed(0)
    return Experts(
        first=linear_of(2 * INNER, HIDDEN, bias=bias, adapter=adapters[0]),
        gate=gate,
        second=linear_of(HIDDEN, INNER, bias=bias, adapter=adapters[1]),
    )


def by_one(x, linear, expert):
    """An expert's product of a token, by PEFT's layout of its factors."""
    weight = torch.empty(linear.weights.height, linear.weights.width)
    reference.dequantise(linear.weights[expert], weight)
    y = weight.double() @ x
    if linear.adapter is not None:
        a = linear.adapter.a.double().reshape(E, RANK, -1)[expert]
        b = linear.adapter.b.double().reshape(-1, RANK, E)[:, :, expert]
        y = y + linear.adapter.scaling * (b @ (a @ x))
    return y if linear.bias is None else y + linear.bias[expert].double()


def formula(x, chosen, weights, of):
    """A token and an expert at a time, in fp64."""
    return torch.stack(
        [
            sum(
                weight * by_one(of.gate(by_one(token, of.first, int(expert))), of.second, int(expert))
                for expert, weight in zip(its_experts, its_weights, strict=True)
            )
            for token, its_experts, its_weights in zip(x.double(), chosen, weights.double(), strict=True)
        ]
    )


def chosen_of(how):
    torch.manual_seed(1)
    if how == "as it comes":
        return torch.stack([torch.randperm(E)[:CHOSEN] for _ in range(T)])
    if how == "two get no token":
        return torch.stack([torch.tensor([0, 2, 4])[torch.randperm(3)[:CHOSEN]] for _ in range(T)])
    return torch.full((T, 1), 3)  # all tokens go to one expert


def leaves(of):
    return [p for linear in (of.first, of.second) if linear.adapter for p in (linear.adapter.a, linear.adapter.b)]


def run(function, of, how):
    chosen = chosen_of(how)
    x = torch.randn(T, HIDDEN).requires_grad_()
    weights = torch.rand(chosen.shape).requires_grad_()
    out = function(x, chosen, weights, of)
    towards = torch.randn(T, HIDDEN)
    gradients = torch.autograd.grad(out, [x, weights, *leaves(of)], towards.to(out.dtype))
    return [out.detach(), *gradients]


ROUTES = ("as it comes", "two get no token", "all to one")


@pytest.mark.parametrize("how", ROUTES)
@pytest.mark.parametrize("adapters", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("gate", "bias"),
    [
        (swiglu, False),
        (clamped, True),
        (Gate(), False),
        (Gate(interleaved=True, alpha=1.7, limit=1.0, one_more=True), True),
    ],
)
def test_experts_are_a_loop_over_tokens_and_so_are_their_gradients(how, adapters, gate, bias):
    of = layer_of(gate=gate, bias=bias, adapters=adapters)
    for ours, exact in zip(run(experts, of, how), run(formula, of, how), strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("gate", "formula_"), [(Gate(), swiglu), (Gate(interleaved=True, alpha=1.7, limit=1.0, one_more=True), clamped)]
)
def test_a_gate_in_one_kernel_is_the_formula_and_so_are_its_gradients(gate, formula_):
    torch.manual_seed(0)
    z, grad, weights = torch.randn(9, 12, dtype=torch.float64), torch.randn(9, 6), torch.rand(9)
    z[0, :2], z[1, :2] = 1.0, -1.0  # at the limits, where a gradient still passes
    z.requires_grad_()
    exact = formula_(z)
    (d_exact,) = torch.autograd.grad(exact, z, (grad * weights[:, None]).double())
    plain, d_z, out, shares = torch.empty(9, 6), torch.empty(9, 12), torch.empty(9, 6), torch.empty(9)
    reference.gate_forward(z.detach().float(), gate, plain)
    reference.gate_backward(z.detach().float(), grad, weights, gate, d_z, out, shares)
    for found, expected in ((plain, exact), (out, exact), (d_z, d_exact), (shares, (exact * grad).sum(dim=1))):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_an_expert_without_a_token_gets_no_gradient():
    of = layer_of()
    _, _, _, a1, b1, a2, b2 = run(experts, of, "two get no token")
    for expert in range(E):
        its = [a.reshape(E, RANK, -1)[expert] for a in (a1, a2)] + [
            b.reshape(-1, RANK, E)[:, :, expert] for b in (b1, b2)
        ]
        assert all(bool(part.any()) == (expert in {0, 2, 4}) for part in its)


@pytest.mark.parametrize("how", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_a_loop_over_experts(how, dtype, monkeypatch):
    """Where GPUs multiply all experts at once; a rank of three is filled up to eight."""
    of = layer_of()
    expected = run(experts, of, how)
    monkeypatch.setattr(grouped, "_goes_in_groups", lambda _x: True)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    rounded = run(lambda x, *rest: experts(x.to(dtype), *rest).float(), of, how)
    for ours, exact in zip(rounded, expected, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < tolerance


def test_memory_of_unused_experts_is_not_read(monkeypatch):
    """Their values are not dequantised: what stands in their place may be anything."""
    of = layer_of()
    expected = run(experts, of, "two get no token")
    monkeypatch.setattr(grouped, "_goes_in_groups", lambda _x: True)
    new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: new(self, *size).fill_(torch.nan))
    for ours, exact in zip(run(experts, of, "two get no token"), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_rows_are_sorted_by_expert_and_go_back_to_their_tokens():
    chosen = torch.tensor([[3, 0], [0, 4], [3, 4]])
    rows = Rows(chosen, E)
    assert rows.expert.tolist() == [0, 0, 3, 3, 4, 4]
    assert rows.token.tolist() == [0, 1, 0, 2, 1, 2]
    assert rows.counts.tolist() == [2, 0, 0, 2, 2]
    assert rows.ends.tolist() == [2, 2, 2, 4, 6]
    assert [expert for expert, _ in rows.spans()] == [0, 3, 4]
    assert torch.equal(rows.by_token(rows.expert), chosen)
    assert torch.equal(rows.by_token(rows.in_order(torch.arange(6).view(3, 2))), torch.arange(6).view(3, 2))
