"""Memory-lean cross-entropy that honours LoRA on lm_head, a chunk of targets at a time.

Where the head is a layer of ours, logits are computed once and their gradient is written over them. Where a model caps
or scales its logits, or PEFT's own forward is the head's, they are recomputed in the backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from job.kernels.head_loss import head_loss
from job.kernels.linear_op import linear
from job.kernels.weights import Linear
from job.tune.model.config import softcap_and_scale

CHUNK_TARGETS = 1024
"""Targets whose logits exist at once: 131 MB in fp32 for a vocabulary of 32,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Hidden states -> logits, as the model itself does it."""

    module: Callable[[Tensor], Tensor]
    """The output embedding, with its adapter where it has one: reading its `.weight` would lose the adapter."""
    softcap: float | None
    """Bound of the logits (Gemma 2)."""
    scale: float
    """Factor on the logits (Cohere's logit_scale, Granite's 1 / logits_scaling)."""
    layer: Linear | None = None
    """The same as the kernels take it; None: `module` computes the logits."""
    mask_seed: Tensor | None = None
    """[1] int64 on the device: seed of its adapter's dropout; None: no dropout."""

    def logits(self, hidden: Tensor, mask_seed: Tensor | None = None) -> Tensor:
        """[N, hidden] -> [N, vocabulary] fp32; PEFT's own forward draws its own masks."""
        logits = (self.module(hidden) if self.layer is None else linear(hidden, self.layer, mask_seed)).float()
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def head_of(causal_lm: Any) -> Head:
    """The head of a causal language model from transformers."""
    module = causal_lm.get_output_embeddings()
    softcap, scale = softcap_and_scale(causal_lm.config)
    return Head(
        module=module,
        softcap=softcap,
        scale=scale,
        layer=None if getattr(module, "disable_adapters", False) else getattr(module, "fused", None),
        mask_seed=module.mask_seed if module.training and hasattr(module, "mask_seed") else None,
    )


def summed_loss(hidden: Tensor, target_ids: Tensor, head: Head, *, weight_per_target: float) -> tuple[Tensor, Tensor]:
    """The weighted sum of all losses, for its gradients; and each target's loss in nats, [N] fp32, detached.

    Args:
        hidden: [N, hidden], only the places whose next token is a target.
        target_ids: [N] int64.
        head: from `head_of`.
        weight_per_target: one over the targets of the whole step.
    """
    if head.layer is None or head.softcap is not None or head.scale != 1:
        losses = token_losses(hidden, target_ids, head)
        return losses.sum() * weight_per_target, losses.detach()
    adapter = head.layer.adapter
    learning = (None, None) if adapter is None else (adapter.a, adapter.b)
    apply: Callable[..., tuple[Tensor, Tensor]] = _SummedLoss.apply
    total, losses = apply(hidden, *learning, target_ids, head.layer, weight_per_target, head.mask_seed)
    return total, losses


class _SummedLoss(torch.autograd.Function):
    """Its gradients are computed in the forward, while the logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        a: Tensor | None,  # noqa: ARG004 - for autograd to see that it is trained; its values are the layer's
        b: Tensor | None,  # noqa: ARG004 - as above
        target_ids: Tensor,
        layer: Linear,
        weight_per_target: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        result = head_loss(hidden, target_ids, layer, weight_per_target=weight_per_target, seed=seed)
        ctx.save_for_backward(result.hidden, result.a, result.b)
        ctx.mark_non_differentiable(result.losses)
        return result.losses.sum() * weight_per_target, result.losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if each is None else each * grads[0].to(each.dtype) for each in ctx.saved_tensors)
        return *scaled, None, None, None, None


def token_losses(hidden: Tensor, target_ids: Tensor, head: Head) -> Tensor:
    """Loss of each target, in nats.

    Args:
        hidden: [N, hidden], only the places whose next token is a target: ignored tokens are never projected.
        target_ids: [N] int64.
        head: from `head_of`.

    Returns:
        [N] fp32. Logits are recomputed in the backward, so at most a chunk of them exists.
    """

    def losses(part: Tensor, ids: Tensor, number: int) -> Tensor:
        seed = None if head.mask_seed is None else head.mask_seed + number  # each chunk has masks of its own
        return cross_entropy(head.logits(part, seed), ids, reduction="none")

    chunks = zip(torch.split(hidden, CHUNK_TARGETS), torch.split(target_ids, CHUNK_TARGETS), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([losses(*chunk, number) for number, chunk in enumerate(chunks)])
    return torch.cat([checkpoint(losses, *chunk, number, use_reentrant=False) for number, chunk in enumerate(chunks)])


@torch.no_grad()
def token_scores(hidden: Tensor, target_ids: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Loss of each target in nats, and whether it was the model's first choice: [N] fp32, [N] bool."""
    losses, hits = [], []
    for part, ids in zip(torch.split(hidden, CHUNK_TARGETS), torch.split(target_ids, CHUNK_TARGETS), strict=True):
        logits = head.logits(part)
        losses.append(cross_entropy(logits, ids, reduction="none"))
        hits.append(logits.argmax(dim=-1) == ids)
    return torch.cat(losses), torch.cat(hits)
