"""One linear layer with its adapter, forward and backward: y = x W^T + bias + s dropout(x) A^T B^T.

A quantised W is dequantised at each use; an adapter in fp32 is rounded to the dtype of x. The adapter's product comes
first and the large product is added to it, which reads it while it multiplies: in the other order the thin product
would read and write the whole result once more.
LoRA: Hu et al. 2021, arXiv 2106.09685, eq. 3.
"""

import torch
from torch import Tensor

from job.kernels.ops import Masks
from job.kernels.weights import Adapter, Linear, Quantised, exact_product
from job.kernels.which_ops import ops_of


def forward(x: Tensor, layer: Linear, masks: Masks | None) -> tuple[Tensor, Tensor]:
    """The layer's result, and the low-rank activations of its adapter.

    Args:
        x: [T, K].
        layer: with a weight of [N, K].
        masks: dropout masks of x; None: no dropout.

    Returns:
        y [T, N], and h = dropout(x) A^T [T, r]; r is 0 without an adapter.
    """
    w_t = _values(layer, x).t()
    if layer.adapter is None:
        y = torch.mm(x, w_t) if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), x, w_t)
        return y, x.new_empty(len(x), 0)
    a, b = _rounded(layer.adapter, x)
    h = _ranks(x, a, masks)
    y = torch.mm(h, b.t()) if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), h, b.t())
    return y.addmm_(x, w_t), h


def backward(
    grad: Tensor, x: Tensor, h: Tensor, layer: Linear, masks: Masks | None, *, wants_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [T, K], A [r, K] and B [N, r] from that of y [T, N]; the adapter's are summed in fp32.

    With g = s dy B: dx = dy W + dropout(g A), dA = g^T dropout(x), dB = s dy^T h. dA and dB are None without an
    adapter, dx is None unless `wants_x`.
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
    """Dropout masks of an adapter's input; None where nothing is dropped.

    Args:
        adapter: the layer's; None: it has none.
        seed: [1] int64 on the device, the layer's in this micro-batch; None: no dropout, as when evaluating.
        site: number of the input among those that share the seed.
    """
    if seed is None or adapter is None or not adapter.dropout:
        return None
    return Masks(seed=seed, site=site, adapters=1, rate=adapter.dropout)


def _values(layer: Linear, x: Tensor) -> Tensor:
    """W [N, K] in the dtype of x, dequantised where it is quantised."""
    if not isinstance(layer.weight, Quantised):
        return layer.weight.to(x.dtype)
    values = x.new_empty(layer.height, layer.width)
    ops_of(x.device).dequantise(layer.weight, values)
    return values


def _rounded(adapter: Adapter, x: Tensor) -> tuple[Tensor, Tensor]:
    """A and s B in the dtype of x."""
    return adapter.a.detach().to(x.dtype), (adapter.b.detach() * adapter.scaling).to(x.dtype)


def _ranks(x: Tensor, a: Tensor, masks: Masks | None) -> Tensor:
    """dropout(x) A^T: [T, r]."""
    if masks is None:
        return torch.mm(x, a.t())
    out = x.new_empty(len(x), len(a))
    ops_of(x.device).masked_ranks(x, a, out, masks)
    return out
