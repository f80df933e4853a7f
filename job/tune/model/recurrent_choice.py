"""Whether fla's kernels compute a base's recurrent layers here: only where they agree with transformers' own code."""

from collections.abc import Callable, Sequence
from typing import Any

import structlog
import torch
from torch import Tensor
from torch.nn.functional import normalize

from job.kernels.triton_recurrent import Asked, asked_of_fla, computes_by_fla, leave_fla, take_kernels
from job.tune.device.failures import error_line
from job.tune.model.config import empty_model
from job.tune.model.recurrent import mixers_of, recurrent_shape

log = structlog.get_logger(__name__)
_TRIED = (1, 63, 64, 65, 200, 3)
"""Tokens of the documents that kernels are tried with: below, at and above a chunk, and several chunks."""
_TOLERANCE = 0.1
"""Difference of a result or a gradient, as a share of its norm. Rounding to bf16 makes 0.004 of a convolution's, and
some times that where sums of rounded numbers are rounded again; another formula is further away."""
_NAMES = {
    "delta rule": ("result", "query", "key", "value", "decay", "writing strength"),
    "convolution": ("result", "input"),
}


def choose_recurrent(causal_lm: Any, device: torch.device) -> None:
    """Take fla's kernels for a model's layers, and on a GPU leave them again if they compute something else there.

    Nothing else would notice: rows of one document each are computed by the same kernels as packed ones.

    Args:
        causal_lm: the model.
        device: what computes.
    """
    mixers = [module for _, module in mixers_of(causal_lm)]
    take_kernels(mixers)
    if mixers and device.type == "cuda" and computes_by_fla():
        against = _tried(device, causal_lm.config)
        if against is not None:
            leave_fla()
            then = "slower, one document a row, by transformers' own code"
            log.warning("recurrent_layers_left_to_transformers", reason=against, then=then)


def _tried(device: torch.device, config: Any) -> str | None:
    try:
        with asked_of_fla() as asked:
            recurrent_shape(empty_model(config), config)
        of_each_kind = {(each.kind, *_sizes(each)): each for each in asked}
        found = (difference_from_plain(each, device) for each in of_each_kind.values())
        return next((against for against in found if against is not None), None)
    except Exception as error:  # noqa: BLE001 - a compiler or a driver may refuse in any way
        return error_line(error)


def _sizes(asked: Asked) -> tuple[Any, ...]:
    along = _along(asked)
    return tuple(None if each is None else (*each.shape[:along], *each.shape[along + 1 :]) for each in asked.given)


def _along(asked: Asked) -> int:
    """The dimension of tokens."""
    return 1 if asked.kind == "delta rule" else 2


def difference_from_plain(asked: Asked, device: torch.device) -> str | None:
    """How what fla makes of made-up documents in one row differs from transformers' own code, one after another.

    Args:
        asked: sizes and types of the base's layers, and both ways.
        device: what computes.

    Returns:
        The first difference that rounding does not explain, of the result or a gradient; None where there is none.
    """
    along, tokens = _along(asked), sum(_TRIED)
    generator = torch.Generator(device).manual_seed(0)
    borders = torch.tensor([0, *_TRIED], device=device).cumsum(0).to(torch.int32)
    given = _made_up(asked, tokens, device, generator)
    moving = given if asked.kind == "delta rule" else given[:1]
    rest = given[len(moving) :]

    def by_borders(*rows: Tensor) -> Tensor:
        return asked.by_borders(borders, *rows, *rest)

    def alone(*rows: Tensor) -> Tensor:
        documents = zip(*(torch.split(row, [*_TRIED], dim=along) for row in rows), strict=True)
        return torch.cat([asked.alone(*document, *rest) for document in documents], dim=along)

    # Who calls may keep what is saved for a backward in a way of its own.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
        ours, theirs = (_with_gradients(way, moving) for way in (by_borders, alone))
    for name, one, other in zip(_NAMES[asked.kind], ours, theirs, strict=True):
        off = float((one.float() - other.float()).norm() / other.float().norm())
        if not off <= _TOLERANCE:
            what = name if name == "result" else f"gradient of the {name}"
            return f"of the {asked.kind} by fla the {what} differs by {off:.1%}"
    return None


def _made_up(asked: Asked, tokens: int, device: torch.device, generator: torch.Generator) -> list[Any]:
    along = _along(asked)

    def normal(like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        shape = (1, *like.shape[1:along], tokens, *like.shape[along + 1 :]) if like.dim() > along else like.shape
        return torch.randn(shape, generator=generator, device=device)

    made = [normal(each) for each in asked.given]
    if asked.kind == "delta rule":
        query, key, value, decay, strength = made
        assert query is not None and key is not None and decay is not None and strength is not None  # noqa: PT018
        made = [normalize(query, dim=-1), normalize(key, dim=-1), value, -0.3 * decay.abs(), strength.sigmoid()]
    return [
        each if each is None or like is None else each.to(like.dtype)
        for each, like in zip(made, asked.given, strict=True)
    ]


def _with_gradients(way: Callable[..., Tensor], rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    rows = [row.detach().requires_grad_() for row in rows]
    result = way(*rows)
    upward = torch.randn(result.shape, generator=torch.Generator(result.device).manual_seed(1), device=result.device)
    return result.detach(), *torch.autograd.grad(result, rows, upward.to(result.dtype))
