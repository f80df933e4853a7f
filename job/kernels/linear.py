"""One linear layer with its adapter, there and back: y = x W^T + bias + s dropout(x) A^T B^T.

W is decoded from NF4 where it is used, if it does not come decoded; an adapter in fp32 is rounded there to what is
computed in. The adapter's product comes first and the large one is added to it, which reads it while it multiplies: the
other way round a thin product would read and write all of the result once more.
LoRA: Hu et al. 2021, arXiv 2106.09685, eq. 3.
"""

import torch
from torch import Tensor

from job.kernels.ops import Masks
from job.kernels.weights import Adapter, Linear, Quantised, exact_product
from job.kernels.which_ops import ops_of


def forward(x: Tensor, layer: Linear, masks: Masks | None) -> tuple[Tensor, Tensor]:
    """The layer's result and the input of its ranks.

    Args:
        x: [T, K].
        layer: whose weight is [N, K].
        masks: of x, for the adapter's dropout; None: there is none.

    Returns:
        [T, N], and h = dropout(x) A^T [T, r]; r is 0 without an adapter.
    """
    across = _values(layer, x).t()
    if layer.adapter is None:
        y = torch.mm(x, across) if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), x, across)
        return y, x.new_empty(len(x), 0)
    a, b = _rounded(layer.adapter, x)
    h = _ranks(x, a, masks)
    y = torch.mm(h, b.t()) if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), h, b.t())
    return y.addmm_(x, across), h


def backward(
    grad: Tensor, x: Tensor, h: Tensor, layer: Linear, masks: Masks | None, *, wants_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [T, K], A [r, K] and B [N, r] from that of y [T, N]; the adapter's are summed in fp32.

    With g = s dy B: dx = dy W + dropout(g A), dA = g^T dropout(x), dB = s dy^T h. Without an adapter there are no dA
    and dB, and dx is left out where nobody wants it.
    """
    adapter = layer.adapter
    if adapter is None:
        return torch.mm(grad, _values(layer, x)) if wants_x else None, None, None
    a, b = _rounded(adapter, x)
    thin = torch.mm(grad, b)
    d_x = None
    if wants_x and masks is None:
        d_x = torch.mm(thin, a).addmm_(grad, _values(layer, x))
    elif wants_x and masks is not None:
        d_x = torch.mm(grad, _values(layer, x))
        ops_of(x.device).masked_add(thin, a, d_x, masks)
    d_a = exact_product(thin, x) if masks is None else ops_of(x.device).masked_gradient(thin, x, masks)
    return d_x, d_a, exact_product(grad, h).mul_(adapter.scaling)


def masks_of(adapter: Adapter | None, seed: Tensor | None, *, site: int = 0) -> Masks | None:
    """Masks of an adapter's input; None where nothing is dropped.

    Args:
        adapter: one layer's.
        seed: [1] int64 on the device, of the layer in this micro-batch; None: not training.
        site: which of its inputs this is.
    """
    if seed is None or adapter is None or not adapter.dropout:
        return None
    return Masks(seed=seed, site=site, adapters=1, rate=adapter.dropout)


def _values(layer: Linear, x: Tensor) -> Tensor:
    """W [N, K] in x's type."""
    if not isinstance(layer.weight, Quantised):
        return layer.weight.to(x.dtype)
    values = x.new_empty(layer.height, layer.width)
    ops_of(x.device).dequantise(layer.weight, values)
    return values


def _rounded(adapter: Adapter, x: Tensor) -> tuple[Tensor, Tensor]:
    """A, and s B."""
    return adapter.a.detach().to(x.dtype), (adapter.b.detach() * adapter.scaling).to(x.dtype)


def _ranks(x: Tensor, a: Tensor, masks: Masks | None) -> Tensor:
    """dropout(x) A^T: [T, r]."""
    if masks is None:
        return torch.mm(x, a.t())
    out = x.new_empty(len(x), len(a))
    ops_of(x.device).masked_ranks(x, a, out, masks)
    return out
