"""Memory-lean cross-entropy that honours LoRA on lm_head: the head is called as a module, a chunk at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

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

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocabulary] fp32."""
        logits = self.module(hidden).float() * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def head_of(causal_lm: Any) -> Head:
    """The head of a causal language model from transformers."""
    config = causal_lm.config
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Head(
        module=causal_lm.get_output_embeddings(),
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=scale / divisor,
    )


def token_losses(hidden: Tensor, target_ids: Tensor, head: Head) -> Tensor:
    """Loss of each target, in nats.

    Args:
        hidden: [N, hidden], only the places whose next token is a target: ignored tokens are never projected.
        target_ids: [N] int64.
        head: from `head_of`.

    Returns:
        [N] fp32. Logits are computed again in the backward pass, so at most a chunk of them exists.
    """

    def losses(part: Tensor, ids: Tensor) -> Tensor:
        return cross_entropy(head.logits(part), ids, reduction="none")

    chunks = zip(torch.split(hidden, CHUNK_TARGETS), torch.split(target_ids, CHUNK_TARGETS), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([losses(part, ids) for part, ids in chunks])
    return torch.cat([checkpoint(losses, part, ids, use_reentrant=False) for part, ids in chunks])


@torch.no_grad()
def token_scores(hidden: Tensor, target_ids: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Loss of each target in nats, and whether it was the model's first choice: [N] fp32, [N] bool."""
    losses, hits = [], []
    for part, ids in zip(torch.split(hidden, CHUNK_TARGETS), torch.split(target_ids, CHUNK_TARGETS), strict=True):
        logits = head.logits(part)
        losses.append(cross_entropy(logits, ids, reduction="none"))
        hits.append(logits.argmax(dim=-1) == ids)
    return torch.cat(losses), torch.cat(hits)
