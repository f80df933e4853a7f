"""A layer's experts in NF4, forward and backward: out = sum over a token's experts of w (W2 gate(W1 x + b1) + b2).

Rows, a token's way through one of its experts each, are sorted by expert, so that a product is one for each expert.
Weights are dequantised at each use, those of experts that have rows; of activations the tokens and the first
product are kept, and the rest is recomputed in the backward. An adapter has factors for each expert:
W_e + s B_e A_e, Hu et al. 2021, arXiv 2106.09685, eq. 3. Experts: Shazeer et al. 2017, arXiv 1701.06538, eq. 1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from job.kernels.ops import Gate
from job.kernels.weights import QuantisedExperts
from job.kernels.which_ops import ops_of

_ALIGNED = 8
"""Numbers in bf16 that are 16 bytes, which grouped products want rows to start at."""
_FEW = 16
"""Rows that a product on the CPU has at least: one of one to three rows is added up in another order, and a token's
result would depend on how many others go to the same expert."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertsAdapter:
    """LoRA on one weight of each expert, laid out as PEFT does."""

    a: Tensor
    """[E r, K] fp32: the experts' A one below the other."""
    b: Tensor
    """[N, r E] fp32: column r' E + e is the rank r' of expert e."""
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertsLinear:
    """One of the two products of each expert."""

    weights: QuantisedExperts
    bias: Tensor | None
    """[E, N]."""
    adapter: ExpertsAdapter | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experts:
    """A layer's experts."""

    first: ExpertsLinear
    """W1: [E, N, hidden]."""
    gate: Gate | Callable[[Tensor], Tensor]
    """What stands between the products: [S, N] -> [S, inner], differentiable, row by row. A `Gate` is one kernel."""
    second: ExpertsLinear
    """W2: [E, hidden, inner]."""


class Rows:
    """Which expert each row goes to: rows are a token's chosen experts, sorted by expert, tokens in their order."""

    def __init__(self, chosen: Tensor, experts: int) -> None:
        """Nothing is asked of the device.

        Args:
            chosen: [T, k] int64, each token's experts.
            experts: how many there are.
        """
        self.per_token = chosen.shape[1]
        self.expert, self._order = torch.sort(chosen.reshape(-1), stable=True)
        self.token = self._order // self.per_token
        """[S], of each row."""
        bounds = torch.arange(experts + 1, device=chosen.device)
        ends = torch.searchsorted(self.expert, bounds)
        self.ends = ends[1:].to(torch.int32)
        """[E]: where each expert's rows end."""
        self.counts = ends.diff().to(torch.int32)
        """[E]: rows of each expert."""
        self.places = torch.empty_like(self._order)
        """[T, k]: where a token's rows are."""
        self.places[self._order] = torch.arange(len(self._order), device=chosen.device)
        self.places = self.places.view(chosen.shape)
        self._spans: list[tuple[int, slice]] | None = None

    def spans(self) -> Sequence[tuple[int, slice]]:
        """Each expert that has rows, and which; asks the device the first time."""
        if self._spans is None:
            ends = [0, *self.ends.tolist()]
            self._spans = [(n, slice(*pair)) for n, pair in enumerate(pairwise(ends)) if pair[0] < pair[1]]
        return self._spans

    def in_order(self, weights: Tensor) -> Tensor:
        """What tokens have for each chosen expert, [T, k], for the rows: [S]."""
        return weights.reshape(-1)[self._order]

    def by_token(self, rows: Tensor) -> Tensor:
        """Rows [S, ...] where they came from: [T, k, ...]."""
        return rows[self.places]

    def sums(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """Each token's rows [S, N] together, each by its weight [T, k] or once: [T, N]."""
        out = rows.new_empty(len(self.places), rows.shape[1])
        ops_of(rows.device).combine_rows(rows, self.places, weights, out)
        return out


def experts(x: Tensor, chosen: Tensor, weights: Tensor, of: Experts) -> Tensor:
    """The experts' weighted sum.

    Args:
        x: [T, hidden].
        chosen: [T, k] int64, each token's experts.
        weights: [T, k], what each one's result counts.
        of: the layer's experts.

    Returns:
        [T, hidden].
    """
    factors = [factor for linear in (of.first, of.second) for factor in _factors(linear)]
    apply: Callable[..., Tensor] = _Experts.apply
    return apply(x, weights, *factors, of, Rows(chosen, len(of.first.weights)))


def _factors(linear: ExpertsLinear) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if linear.adapter is None else (linear.adapter.a, linear.adapter.b)


class _Experts(torch.autograd.Function):
    """Adapters are arguments of their own, so that autograd asks for their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, *arguments: Any) -> Tensor:
        *_factors, of, rows = arguments
        inner = _product(x[rows.token], of.first, rows)
        result = _product(_gated(inner, of), of.second, rows)
        ctx.save_for_backward(x, weights, inner)
        ctx.of, ctx.rows = of, rows
        out: Tensor = rows.sums(result, weights)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With u = dout W2, each row's gradient of its gated activations before it is weighted: dw = u . gate(z)."""
        x, weights, inner = ctx.saved_tensors
        of, rows, (grad,) = ctx.of, ctx.rows, grads
        wants_x, wants_weights = ctx.needs_input_grad[:2]
        w = rows.in_order(weights)
        grad_rows = grad[rows.token]
        d_gated, thin = _to_input(grad_rows, of.second, rows)
        d_inner, gated, shares = _gate_backward(inner, d_gated, w, of)
        d_a2, d_b2 = _to_adapter(grad_rows, thin, gated, of.second, rows, row_weights=w[:, None])
        if of.second.bias is not None and wants_weights:
            shares += (grad_rows.float() * of.second.bias[rows.expert].float()).sum(dim=1)
        d_weights = rows.by_token(shares).to(weights.dtype) if wants_weights else None
        del grad_rows, d_gated, gated  # what follows is as large again
        d_rows, thin = _to_input(d_inner, of.first, rows, wants_rows=wants_x)
        d_x = rows.sums(d_rows) if wants_x else None
        del d_rows
        its_x = x if of.first.adapter is None else x[rows.token]
        d_a1, d_b1 = _to_adapter(d_inner, thin, its_x, of.first, rows)
        return d_x, d_weights, d_a1, d_b1, d_a2, d_b2, None, None


def _gated(inner: Tensor, of: Experts) -> Tensor:
    if not isinstance(of.gate, Gate):
        return of.gate(inner)
    out = inner.new_empty(len(inner), of.second.weights.width)
    ops_of(inner.device).gate_forward(inner, of.gate, out)
    return out


def _gate_backward(inner: Tensor, d_gated: Tensor, w: Tensor, of: Experts) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the first product, each row by its weight; the gate's result again; result . gradient, [S] fp32."""
    if isinstance(of.gate, Gate):
        d_inner, gated = torch.empty_like(inner), torch.empty_like(d_gated)
        shares = torch.empty(len(inner), dtype=torch.float32, device=inner.device)
        ops_of(inner.device).gate_backward(inner, d_gated, w, of.gate, d_inner, gated, shares)
        return d_inner, gated, shares
    with torch.enable_grad():
        inner = inner.detach().requires_grad_()
        gated = of.gate(inner)
    (d_inner,) = torch.autograd.grad(gated, inner, (d_gated * w[:, None]).to(gated.dtype))
    gated = gated.detach()
    return d_inner, gated, (d_gated.float() * gated.float()).sum(dim=1)


def _product(x: Tensor, linear: ExpertsLinear, rows: Rows) -> Tensor:
    """X W^T + s x A^T B^T + bias, each row by its expert: [S, N]."""
    result = _by_weights(x, linear.weights, rows, transposed=True)
    if linear.adapter is not None:
        a, b = _rounded(linear.adapter, len(linear.weights), x)
        result += _by_matrices(_by_matrices(x, a, rows, transposed=True), b, rows, transposed=True)
    if linear.bias is not None:
        result += linear.bias.to(x.dtype)[rows.expert]
    return result


def _to_input(
    grad: Tensor, linear: ExpertsLinear, rows: Rows, *, wants_rows: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Gradient of what was multiplied, [S, K], from that of each row's result [S, N]; and grad s B, which is in it."""
    d_x = _by_weights(grad, linear.weights, rows, transposed=False) if wants_rows else grad
    if linear.adapter is None:
        return d_x, None
    a, b = _rounded(linear.adapter, len(linear.weights), grad)
    thin = _by_matrices(grad, b, rows, transposed=False)
    if wants_rows:
        d_x += _by_matrices(thin, a, rows, transposed=False)
    return d_x, thin


def _to_adapter(
    grad: Tensor,
    thin: Tensor | None,
    x: Tensor,
    linear: ExpertsLinear,
    rows: Rows,
    *,
    row_weights: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the adapter's factors from what was multiplied, x [S, K]; each row counts by its weight."""
    if linear.adapter is None or thin is None:
        return None, None
    a, _ = _rounded(linear.adapter, len(linear.weights), x)
    h = _by_matrices(x, a, rows, transposed=True)
    if row_weights is not None:
        h, thin = (h * row_weights).to(x.dtype), (thin * row_weights).to(x.dtype)
    d_a, d_b = _sums(thin, x, rows, len(a)), _sums(grad, h, rows, len(a))
    return d_a.reshape(linear.adapter.a.shape), _as_peft_has_b(d_b.mul_(linear.adapter.scaling))


def _rounded(adapter: ExpertsAdapter, experts_: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """A [E, r, K] and s B [E, N, r] in the dtype of x."""
    a = adapter.a.detach().to(x.dtype).view(experts_, -1, adapter.a.shape[1])
    b = (adapter.b.detach() * adapter.scaling).to(x.dtype).view(adapter.b.shape[0], -1, experts_)
    return a, b.permute(2, 0, 1).contiguous()


def _as_peft_has_b(b: Tensor) -> Tensor:
    """[E, N, r] -> [N, r E]."""
    return b.permute(1, 2, 0).reshape(b.shape[1], -1)


def _by_weights(x: Tensor, weights: QuantisedExperts, rows: Rows, *, transposed: bool) -> Tensor:
    """Each row by its expert's W, or W^T where transposed; on the CPU one expert is dequantised at a time."""
    if _goes_in_groups(x):
        values = x.new_empty(len(weights), weights.height, weights.width)
        ops_of(x.device).dequantise_experts(weights, rows.counts, values)
        return _in_groups(x, values, rows, transposed=transposed)
    values = x.new_empty(weights.height, weights.width)

    def matrices() -> Iterator[Tensor]:
        for expert, _ in rows.spans():
            ops_of(x.device).dequantise(weights[expert], values)
            yield values

    return _one_by_one(x, matrices(), weights.height if transposed else weights.width, rows, transposed=transposed)


def _by_matrices(x: Tensor, matrices: Tensor, rows: Rows, *, transposed: bool) -> Tensor:
    """Each row by its expert's matrix of [E, n, k], or by its transpose."""
    if _goes_in_groups(x):
        return _in_groups(x, matrices, rows, transposed=transposed)
    width = matrices.shape[1 if transposed else 2]
    return _one_by_one(x, (matrices[n] for n, _ in rows.spans()), width, rows, transposed=transposed)


def _goes_in_groups(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def _one_by_one(x: Tensor, matrices: Iterator[Tensor], width: int, rows: Rows, *, transposed: bool) -> Tensor:
    """A product for each expert that has rows; one matrix may be written over the one before."""
    out = x.new_empty(len(x), width)
    for (_, span), matrix in zip(rows.spans(), matrices, strict=True):
        factor = matrix.t() if transposed else matrix
        count = span.stop - span.start
        if count < _FEW:
            out[span] = torch.mm(functional.pad(x[span], (0, 0, 0, _FEW - count)), factor)[:count]
        else:
            torch.mm(x[span], factor, out=out[span])
    return out


def _in_groups(x: Tensor, matrices: Tensor, rows: Rows, *, transposed: bool) -> Tensor:
    """The same as one grouped product; what is not 16 bytes wide is filled up with zeros."""
    if transposed:
        matrices = matrices.transpose(1, 2)
    height, width = matrices.shape[1:]
    if height % _ALIGNED or width % _ALIGNED:
        more = (-height % _ALIGNED, -width % _ALIGNED)
        matrices, x = functional.pad(matrices, (0, more[1], 0, more[0])), functional.pad(x, (0, more[0]))
    out: Tensor = functional.grouped_mm(x, matrices, offs=rows.ends)
    return out[:, :width]


def _sums(left: Tensor, right: Tensor, rows: Rows, experts_: int) -> Tensor:
    """left^T right over each expert's rows, in fp32: [E, n, k]; zero where there are none."""
    out = torch.empty(experts_, left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
    ops_of(left.device).sums_by_expert(left, right, rows.ends, out)
    return out
