"""Whose attention kernels a device runs: ours where they were measured to be faster and agree with the formula."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import structlog
import torch
from torch import Tensor

from job.kernels.attention import OWN_WIDTHS, Attention, Segments
from job.kernels.blocks import blocks_of
from job.kernels.which_ops import has_triton
from job.tune.device.failures import error_line
from job.tune.engines.attention import reason_against_fused_attention

log = structlog.get_logger(__name__)
_MEASURED_CAPABILITY = 9
"""Hopper's: where ours were measured to be faster than torch's."""
_ATTENDED = (1, 63, 64, 65, 200, 3)
"""Tokens of the documents that attention is tried with: below, at and above a block, and several blocks."""
_WINDOW = 70
_ATTENTION_TOLERANCE = 0.03
"""Difference of attention's result or a gradient from fp32, as a share of its norm; rounding to bf16 gives 0.003."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionChoice:
    """Our own kernels or torch's, and why torch's."""

    own: bool
    reason: str | None
    """Why a GPU runs torch's; None: it runs ours, or there is none."""


def choose_attention(config: Any, device: torch.device, *, sinks: bool = False) -> AttentionChoice:
    """Whose kernels a model with this config runs; the same for every model of its shape in this process.

    Args:
        config: of the decoder.
        device: what computes.
        sinks: whether its attention has any.
    """
    if device.type != "cuda":
        return AttentionChoice(own=False, reason=None)
    against = _reason_against(config, device, sinks=sinks)
    return AttentionChoice(own=against is None, reason=against)


def _reason_against(config: Any, device: torch.device, *, sinks: bool) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != _MEASURED_CAPABILITY:
        return "our kernels were measured on compute capability {}.x, and this is {}.{}".format(
            _MEASURED_CAPABILITY, *capability
        )
    if not has_triton():
        return "Triton is not installed"
    against = reason_against_fused_attention(config)
    if against is not None:
        return against
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return "its config does not name the number of heads"
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if width not in OWN_WIDTHS:
        return f"heads are {width} wide, and our kernels take {', '.join(map(str, OWN_WIDTHS))}"
    return _tried(device, heads, key_heads, width, sinks=sinks)


@cache
def _tried(device: torch.device, heads: int, key_heads: int, width: int, *, sinks: bool) -> str | None:
    """Tried once: the model that proves the published adapter must run the kernels that it was trained with."""
    try:
        against = difference_from_formula(device, heads=heads, key_heads=key_heads, width=width, sinks=sinks)
    except Exception as error:  # noqa: BLE001 - a compiler or a driver may refuse in any way
        against = error_line(error)
    if against is not None:
        log.warning("attention_left_to_torch", reason=against, then="slower by a few percent")
    return against


@torch.no_grad()
def difference_from_formula(
    device: torch.device, *, heads: int, key_heads: int, width: int, sinks: bool = False
) -> str | None:
    """How our own attention kernels differ from the formula in fp32, on made-up documents in bf16.

    Args:
        device: what computes.
        heads: of queries.
        key_heads: of keys and values.
        width: of a head.
        sinks: whether each head has one.

    Returns:
        The first difference that rounding does not explain; None where there is none.
    """
    tokens = sum(_ATTENDED)
    cu_seqlens = torch.tensor([0, *_ATTENDED], device=device).cumsum(0).to(torch.int32)
    plain = Segments(cu_seqlens=cu_seqlens, lengths=_ATTENDED)
    own = replace(plain, blocks=blocks_of(cu_seqlens, tokens))
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, grad = (
        torch.randn(tokens, count, width, generator=generator, device=device).to(torch.bfloat16)
        for count in (heads, key_heads, key_heads, heads)
    )
    # From one that leaves a row as it is to one that takes most of it.
    column = torch.linspace(-8, 8, heads, device=device) if sinks else None
    for window in (None, _WINDOW):
        attention = Attention(scale=width**-0.5, window=window, sinks=column)
        ours = _attended(attention, grad, query, key, value, own)
        theirs = _attended(attention, grad.float(), query.float(), key.float(), value.float(), plain)
        for name, one, other in zip(("result", "query", "key", "value"), ours, theirs, strict=True):
            off = float((one.float() - other).norm() / other.norm())
            if not off <= _ATTENTION_TOLERANCE:
                what = name if name == "result" else f"gradient of the {name}"
                return f"the {what} differs by {off:.1%}"
    return None


def _attended(
    attention: Attention, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, segments: Segments
) -> tuple[Tensor, ...]:
    """The result, and the gradients of query, key and value."""
    out, kept = attention.forward(query, key, value, segments)
    return out, *attention.backward(grad, query, key, value, out, kept, segments)
