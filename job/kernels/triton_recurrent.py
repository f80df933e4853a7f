"""Gated delta layers and short convolutions by fla's kernels, which take the borders of documents.

transformers takes fla for the delta rule wherever it can be imported, on CPUs too, where it does not run; and for short
convolutions another package, which has to be compiled and takes some widths, where fla has one of its own.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

_DELTA_RULE, _CONVOLUTION = "torch_chunk_gated_delta_rule", "causal_conv1d_fn"
_STEP_BY_STEP = "torch_recurrent_gated_delta_rule"
"""Names in transformers' code of these families."""
_OF_MAMBA = "mamba2_chunk_scan"
"""Of others, which have a convolution too, and beside it what fla has no kernel for."""
_CHUNK, _FILLED = 64, 48
"""Tokens that fla's delta rule computes at once; and how many of them a document fills, as it ends within one."""
_RIGHT_TRITON = Version("3.7.1")
_TAKEN = "_takes_borders"


def has_fla() -> bool:
    """Whether fla is installed, with a Triton that computes it right: older ones do not on Hopper, and fla refuses."""
    if any(find_spec(package) is None for package in ("fla", "triton")):
        return False
    return Version(version("triton")) >= _RIGHT_TRITON


def take_kernels(mixers: Iterable[nn.Module]) -> None:
    """Have these layers compute by fla on a GPU, by transformers' own code on CPUs, and be counted on the meta device.

    By transformers' own code on GPUs too, where Triton is too old for fla. Layers of other kinds, and all of them where
    fla is not installed, stay as they are.
    """
    if find_spec("fla") is None:
        return
    for code in {inspect.getmodule(type(mixer)) for mixer in mixers}:
        if hasattr(code, _CONVOLUTION) and not hasattr(code, _OF_MAMBA):
            of_each = {_DELTA_RULE: _delta_rule, _CONVOLUTION: _convolution, _STEP_BY_STEP: _step_by_step}
            for name, taken in of_each.items():
                function = getattr(code, name, None)
                if function is not None and not hasattr(function, _TAKEN):
                    setattr(code, name, taken(function, on_gpus=has_fla()))


def _delta_rule(function: Callable[..., Any], *, on_gpus: bool) -> Callable[..., Any]:
    plain = inspect.unwrap(function)

    @functools.wraps(function)
    def torch_chunk_gated_delta_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        **how: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_cuda and on_gpus:
            _kernels()  # the same ones at every start
            found: tuple[Tensor, Tensor | None] = function(query, key, value, g, beta, cu_seqlens=cu_seqlens, **how)
            return found
        if query.is_meta and on_gpus:
            return _KeptByDeltaRule.apply(query, key, value, g, beta), None  # type: ignore[no-untyped-call] # torch's
        if cu_seqlens is not None:
            raise ValueError("the delta rule keeps documents apart on GPUs alone, by fla")
        there: tuple[Tensor, Tensor | None] = plain(query, key, value, g, beta, **how)
        return there

    setattr(torch_chunk_gated_delta_rule, _TAKEN, True)
    return torch_chunk_gated_delta_rule


def _step_by_step(function: Callable[..., Any], *, on_gpus: bool) -> Callable[..., Any]:
    plain = inspect.unwrap(function)

    @functools.wraps(function)
    def torch_recurrent_gated_delta_rule(query: Tensor, *rows: Tensor, **how: Any) -> tuple[Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor | None] = (function if query.is_cuda and on_gpus else plain)(query, *rows, **how)
        return found

    setattr(torch_recurrent_gated_delta_rule, _TAKEN, True)
    return torch_recurrent_gated_delta_rule


def _convolution(function: Callable[..., Any], *, on_gpus: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **_how: Any,
    ) -> Tensor:
        if hidden_states.is_meta and on_gpus:
            return _KeptByConvolution.apply(hidden_states)  # type: ignore[no-any-return, no-untyped-call] # torch's
        if cu_seq_lens_q is None:
            alone: Tensor = function(hidden_states, weight, bias, activation=activation)
            return alone
        if not (hidden_states.is_cuda and on_gpus):
            raise ValueError("the convolution keeps documents apart on GPUs alone, by fla")
        row = hidden_states.transpose(1, 2)
        result, _ = _kernels()(row, weight, bias, activation=activation, cu_seqlens=cu_seq_lens_q)
        apart: Tensor = result.transpose(1, 2)
        return apart

    setattr(causal_conv1d_fn, _TAKEN, True)
    return causal_conv1d_fn


@functools.cache
def _kernels() -> Callable[..., tuple[Tensor, Any]]:
    """Load fla's kernels and have each compute in one way; returns its convolution.

    Triton would choose between ways by the clock, in each process anew, and another one rounds otherwise: a run that
    goes on elsewhere would not have the bits of one that was never stopped.
    """
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # noqa: F401 - loads what transformers calls
    from triton.runtime.autotuner import Autotuner

    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] == "fla":
            for value in [*vars(module).values()]:
                tuner = value
                while tuner is not None and not isinstance(tuner, Autotuner):
                    tuner = getattr(tuner, "fn", None)  # within what sets its other options
                if tuner is not None:
                    tuner.configs = [_chosen(tuner.configs)]
    return causal_conv1d  # type: ignore[no-any-return] # fla has no types


def _chosen(configs: list[Any]) -> Any:
    """The first of four warps, or what is nearest to it, with the fewest stages: they have to fit any GPU."""
    return min(configs, key=lambda config: (abs(config.num_warps - 4), config.num_stages))


# --- what they keep, on the meta device ------------------------------------------------------------------------------


class _KeptByDeltaRule(torch.autograd.Function):
    """What fla's chunk_gated_delta_rule keeps for its backward, and makes in it, tensor by tensor."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        normed = torch.empty_like(query), torch.empty_like(key)
        within = value.new_empty(*value.shape[:3], _CHUNK)
        kept = value.contiguous()
        sums = g.new_empty(g.shape, dtype=torch.float32)
        ctx.save_for_backward(*normed, kept, sums, beta, within)
        return torch.empty_like(kept)

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> tuple[Tensor, ...]:
        query, key, value, g, beta, _ = ctx.saved_tensors
        rows, tokens, heads, width = value.shape
        a_head = (rows, tokens, heads, key.shape[-1])
        states = [value.new_empty(rows, -(-tokens // _FILLED), heads, key.shape[-1], width) for _ in range(2)]
        made = [value.new_empty(a_head) for _ in range(2)] + [torch.empty_like(value) for _ in range(4)]
        given = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del states, made
        return *given, torch.empty_like(g), torch.empty_like(beta)


class _KeptByConvolution(torch.autograd.Function):
    """What fla's causal_conv1d keeps: what goes in, from which it computes the activation again."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_states)
        return torch.empty_like(hidden_states)

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Tensor:
        (hidden_states,) = ctx.saved_tensors
        return torch.empty_like(hidden_states)
