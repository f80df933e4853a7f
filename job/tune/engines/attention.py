"""Per-document attention: no document of a micro-batch sees another.

Registered with transformers' AttentionInterface, so that any decoder that takes its attention from there can be packed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as random_dropout
from transformers import AttentionInterface

from job.core.errors import UsageError
from job.kernels.attention import visible
from job.kernels.attention_op import document_attention

PER_DOCUMENT = "per_document"
"""The name under which transformers finds this attention."""


def register() -> None:
    """Register this attention with transformers; twice does no harm."""
    AttentionInterface.register(PER_DOCUMENT, per_document_attention)


def reason_against_fused_attention(config: Any) -> str | None:
    """Why a model's attention runs document by document; None: it is fused."""
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention scores are capped"
    if getattr(config, "attention_dropout", 0.0):
        return f"it has attention dropout ({config.attention_dropout})"
    return None


def has_sinks(causal_lm: nn.Module) -> bool:
    """Whether a model's attention has sinks: parameters that transformers hands to it."""
    return any(name.rpartition(".")[2] == "sinks" for name, _ in causal_lm.named_parameters())


def per_document_attention(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    document_cu_seqlens: Tensor,
    document_lengths: Tensor,
    document_blocks: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document: fused, where scores are neither capped nor dropped.

    In B rows of one document each, all T tokens long with their padding, or in one row of T tokens.

    Args:
        module: the attention layer; dropout applies in training mode.
        query: [B, heads, T, width].
        key: [B, key heads, T, width].
        value: [B, key heads, T, width].
        attention_mask: None; the documents take its place.
        document_cu_seqlens: [D + 1] int32 on the device: 0, then where each document ends; the last is B * T.
        document_lengths: [D] int64 on the host: tokens of each document.
        document_blocks: from `blocks_of`, for our own kernels; None: torch's.
        scaling: of the scores; 1 / sqrt(width) when None.
        dropout: of the attention weights.
        sliding_window: how many tokens back a token sees, itself included.
        softcap: bound of the scores (Gemma 2).
        s_aux: [heads], attention sinks: scores that stand in each row's sum alone. They are the base's, and frozen.

    Returns:
        [B, T, heads, width], and no weights.
    """
    if attention_mask is not None:
        raise UsageError(f"{type(module).__name__} uses an attention mask, which packing does not support")
    rate = dropout if module.training else 0.0
    if s_aux is not None and (softcap is not None or rate or s_aux.requires_grad):
        raise UsageError(
            f"{type(module).__name__} has attention sinks beside scores that are capped or dropped, or trains them, "
            "which packing does not support"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if softcap is None and not rate:
        q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
        attended, *_ = document_attention(
            q, k, v, document_cu_seqlens, document_lengths, document_blocks, scale, sliding_window, s_aux
        )
        return attended.unflatten(0, (len(query), -1)), None
    lengths = document_lengths.tolist() if len(query) == 1 else [query.shape[2]]
    parts = zip(*(torch.split(part, lengths, dim=2) for part in (query, key, value)), strict=True)
    outputs = [_weighed(*each, scale=scale, window=sliding_window, softcap=softcap, rate=rate) for each in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _weighed(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, softcap: float | None, rate: float
) -> Tensor:
    """Attention of one document with its weights written out: capped by tanh (Gemma 2, arXiv 2408.00118, section 2)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible(query.shape[2], window, query.device), torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return random_dropout(weights, p=rate) @ value
