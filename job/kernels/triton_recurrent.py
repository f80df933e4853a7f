"""Gated delta layers and short convolutions by fla's kernels, which take the borders of documents.

transformers takes fla for what it has a kernel for, wherever it can be imported: on CPUs too, where it does not run,
and for families that nobody tries here, which get transformers' own code back. For short convolutions it takes
another package, which has to be compiled and knows some widths, where fla has one of its own.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor, nn

_DELTA_RULE, _CONVOLUTION = "torch_chunk_gated_delta_rule", "causal_conv1d_fn"
"""Names in transformers' code of these families."""
BY_BORDERS = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "lfm2", "lfm2_moe", "lfm3")
"""Whose layers fla computes here; in transformers' names of their folders."""
_IN_THE_KERNEL = (None, "silu", "swish")
"""Activations that fla's convolution has; it passes over all others without a word."""
_CHUNK, _FILLED = 64, 48
"""Tokens that fla's delta rule computes at once; and how many of them a document fills, as it ends within one."""
_RIGHT_TRITON = Version("3.7.1")
_TAKEN = "_takes_borders"


def has_fla() -> bool:
    """Whether fla is installed, with a Triton that computes it right: older ones do not on Hopper, and fla refuses."""
    if any(find_spec(package) is None for package in ("fla", "triton")):
        return False
    return Version(version("triton")) >= _RIGHT_TRITON


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a layer asks of one of fla's kernels, and who computes it."""

    kind: Literal["delta rule", "convolution"]
    given: tuple[Tensor | None, ...]
    """On the meta device. Of the delta rule query, key, value, g and beta, each [rows, tokens, heads, ...]; of the
    convolution its input, [rows, channels, tokens], weight and bias."""
    by_borders: Callable[..., Tensor]
    """By fla: a row of documents, from where each begins and ends, and what is given."""
    alone: Callable[..., Tensor]
    """By transformers' own code: one document, from what is given."""


class _Fla:
    """What this process knows of it."""

    left = False
    """Whether it computes something else than transformers' own code does, here."""
    asked: list[Asked] | None = None
    """What is asked of it on the meta device; None: nobody listens."""


def leave_fla() -> None:
    """From here on this process computes by transformers' own code."""
    _Fla.left = True


def computes_by_fla() -> bool:
    """Whether layers that are on a GPU are computed by fla, so that rows may be packed."""
    return has_fla() and not _Fla.left


@contextmanager
def asked_of_fla() -> Iterator[list[Asked]]:
    """What layers that run meanwhile on the meta device ask of it."""
    _Fla.asked = []
    try:
        yield _Fla.asked
    finally:
        _Fla.asked = None


def take_kernels(mixers: Iterable[nn.Module]) -> None:
    """Have these layers compute by fla on a GPU, by transformers' own code on CPUs, and be counted on the meta device.

    By transformers' own code on GPUs too, where Triton is too old for fla, and in families not of `BY_BORDERS`. Where
    fla is not installed all layers stay as they are.
    """
    if find_spec("fla") is None:
        return
    taken = {_DELTA_RULE: _delta_rule, _CONVOLUTION: _convolution}
    for code in {sys.modules[type(mixer).__module__] for mixer in mixers}:
        of_these = any(f".{family}." in code.__name__ for family in BY_BORDERS)
        for name, function in _functions_of(code):
            if of_these and name in taken:
                setattr(code, name, taken[name](function, on_gpus=has_fla()))
            elif _is_fla_s(function):
                setattr(code, name, _plain(function))


def _functions_of(code: ModuleType) -> list[tuple[str, Callable[..., Any]]]:
    """Those that were not taken before."""
    return [(n, each) for n, each in vars(code).items() if inspect.isfunction(each) and not hasattr(each, _TAKEN)]


def _is_fla_s(function: Any) -> bool:
    """Whether transformers calls fla in its place: what it wraps it in remembers the package."""
    while inspect.isfunction(function):
        names = function.__code__.co_freevars
        if "package" in names and function.__closure__:
            return function.__closure__[names.index("package")].cell_contents == "fla"  # type: ignore[no-any-return]
        function = getattr(function, "__wrapped__", None)
    return False


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """By transformers' own code, which gets of the options those that it knows."""
    own = inspect.unwrap(function)
    known = inspect.signature(own).parameters

    @functools.wraps(function)
    def by_torch(*given: Any, **how: Any) -> Any:
        if how.get("cu_seqlens") is not None:
            raise ValueError("recurrent layers keep documents apart on GPUs alone, by fla")
        return own(*given, **{name: each for name, each in how.items() if name in known})

    setattr(by_torch, _TAKEN, True)
    return by_torch


def _delta_rule(function: Callable[..., Any], *, on_gpus: bool) -> Callable[..., Any]:
    plain = _plain(function)

    def by_borders(cu_seqlens: Tensor | None, *given: Tensor, **how: Any) -> tuple[Tensor, Tensor | None]:
        _kernels()  # the same ones at every start
        found: tuple[Tensor, Tensor | None] = function(*given, cu_seqlens=cu_seqlens, **how)
        return found

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
        given = (query, key, value, g, beta)
        if query.is_cuda and on_gpus and not _Fla.left:
            return by_borders(cu_seqlens, *given, **how)
        if query.is_meta and on_gpus:
            _note(
                kind="delta rule",
                given=given,
                by_borders=lambda borders, *rows: by_borders(borders, *rows, **how)[0],
                alone=lambda *rows: plain(*rows, **how)[0],
            )
            return _KeptByDeltaRule.apply(*given), None  # type: ignore[no-untyped-call] # torch's
        there: tuple[Tensor, Tensor | None] = plain(*given, cu_seqlens=cu_seqlens, **how)
        return there

    setattr(torch_chunk_gated_delta_rule, _TAKEN, True)
    return torch_chunk_gated_delta_rule


def _convolution(function: Callable[..., Any], *, on_gpus: bool) -> Callable[..., Any]:
    def alone(hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None) -> Tensor:
        found: Tensor = function(hidden_states, weight, bias, activation=activation)
        return found

    def by_borders(
        cu_seqlens: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None
    ) -> Tensor:
        if activation not in _IN_THE_KERNEL:
            raise ValueError(f"the convolution keeps documents apart with silu or without activation, not {activation}")
        row = hidden_states.transpose(1, 2)
        result, _ = _kernels()(row, weight, bias, activation=activation, cu_seqlens=cu_seqlens)
        apart: Tensor = result.transpose(1, 2)
        return apart

    @functools.wraps(function)
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **_how: Any,
    ) -> Tensor:
        given = (hidden_states, weight, bias)
        if hidden_states.is_meta and on_gpus:
            _note(
                kind="convolution",
                given=given,
                by_borders=functools.partial(by_borders, activation=activation),
                alone=functools.partial(alone, activation=activation),
            )
            return _KeptByConvolution.apply(hidden_states)  # type: ignore[no-any-return, no-untyped-call] # torch's
        if cu_seq_lens_q is None:
            return alone(*given, activation=activation)
        if not (hidden_states.is_cuda and on_gpus) or _Fla.left:
            raise ValueError("the convolution keeps documents apart on GPUs alone, by fla")
        return by_borders(cu_seq_lens_q, *given, activation=activation)

    setattr(causal_conv1d_fn, _TAKEN, True)
    return causal_conv1d_fn


def _note(**what: Any) -> None:
    if _Fla.asked is not None:
        _Fla.asked.append(Asked(**what))


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
