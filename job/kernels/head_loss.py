"""The head and its loss: a chunk of targets at a time, and the loss's gradient is written over the logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from job.kernels import linear as layer
from job.kernels.weights import Linear
from job.kernels.which_ops import ops_of

LOGITS_AT_ONCE = 2**27
"""Logits that exist at once, at most: 256 MiB in bf16, beyond which the products are no faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLoss:
    """Losses of the targets, and the gradients of their sum times `weight_per_target`."""

    losses: Tensor
    """[N] fp32, in nats."""
    hidden: Tensor
    """[N, hidden]: gradient of the hidden states."""
    a: Tensor | None
    """[r, hidden] fp32: gradient of the adapter's A; None without an adapter."""
    b: Tensor | None
    """[vocabulary, r] fp32: gradient of the adapter's B; None without an adapter."""


def head_loss(
    hidden: Tensor, targets: Tensor, head: Linear, *, weight_per_target: float, seed: Tensor | None
) -> HeadLoss:
    """Forward and backward at once, a chunk of targets at a time: logits are computed once and never exist as a whole.

    Args:
        hidden: [N, hidden]; N may be 0.
        targets: [N] int64.
        head: the output layer.
        weight_per_target: factor of each loss in the sum whose gradients are computed.
        seed: [1] int64 on the device: seed of the adapter's dropout; None: no dropout.
    """
    ops = ops_of(hidden.device)
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    d_hidden, weight_on_device = torch.empty_like(hidden), torch.full((1,), weight_per_target, device=hidden.device)
    d_a = d_b = None
    if head.adapter is not None:
        d_a, d_b = torch.zeros_like(head.adapter.a), torch.zeros_like(head.adapter.b)
    size = max(1, LOGITS_AT_ONCE // head.height)
    for number, start in enumerate(range(0, len(hidden), size)):
        part = slice(start, min(start + size, len(hidden)))
        masks = layer.masks_of(head.adapter, seed, site=number)
        logits, h = layer.forward(hidden[part], head, masks)
        ops.cross_entropy_in_place(logits, targets[part], losses[part], weight_on_device)
        d_part, more_a, more_b = layer.backward(logits, hidden[part], h, head, masks, wants_x=True)
        del logits
        if d_part is not None:
            d_hidden[part] = d_part
        if d_a is not None and d_b is not None and more_a is not None and more_b is not None:
            d_a += more_a
            d_b += more_b
    return HeadLoss(losses=losses, hidden=d_hidden, a=d_a, b=d_b)
