"""How the decoder's layers run: compiled or not, with activations kept or recomputed in the backward."""

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import config as compiler
from torch._dynamo.utils import counters, get_compilation_metrics
from torch._inductor import config as inductor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from job import kernels
from job.tune.model.sharded.layers import ShardedLayers, layers_of

_MOST_VARIANTS = 64
"""Variants of a layer's code, by kind of layer; a model that needs more would be compiled all the time."""


class LayerForwards:
    """Replaces the forward of a model's layers; compiled code runs only where there will be a backward."""

    def __init__(self, causal_lm: Any, sharded: ShardedLayers | None = None) -> None:
        self._layers = layers_of(causal_lm)
        self._sharded = sharded
        self._run = _as_it_is
        self.recomputing = False
        """Whether activations are recomputed in the backward."""
        self.compiled = False
        for number, layer in enumerate(self._layers):
            layer.forward = partial(self._forward if sharded is None else partial(self._sharded_forward, number), layer)

    def __bool__(self) -> bool:
        return bool(self._layers)

    def _forward(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return _as_it_is(layer, *args, **kwargs)
        if self.compiled:
            _mark_tokens((args, kwargs))
        if self.recomputing:
            return checkpoint(self._run, layer, *args, use_reentrant=False, **kwargs)
        return self._run(layer, *args, **kwargs)

    def _sharded_forward(self, number: int, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Ask for the layer's weights first, and leave a mark by which the backward asks for them again."""
        sharded = self._sharded
        assert sharded is not None, "its forward is this one because of that"
        if number == 0:
            sharded.begin(trains=torch.is_grad_enabled())
        sharded.forward(number)
        result = self._forward(layer, *args, **kwargs)
        if not torch.is_grad_enabled():
            return result
        if isinstance(result, tuple):
            return (_marked(result[0], sharded, number), *result[1:])
        return _marked(result, sharded, number)

    def compile(self, backend: str) -> None:
        """Compile the layers from now on; all layers of one kind share their code, whatever a micro-batch's size.

        Each variant is compiled at its first call, which raises where the compiler fails or variants are too many.
        """
        compiler.recompile_limit = _MOST_VARIANTS
        # A cache on disk is keyed by what the compiler saw, and the backwards of our ops are not part of that.
        torch.compiler.config.cache_key_tag = digest_of(Path(kernels.__path__[0]))
        options: Any = None
        if backend == "inductor" and hasattr(inductor, "deterministic"):
            # By rule, not by timing: another start must choose the same kernels, whose sums have the same order.
            options = {"deterministic": True}
        self._run = torch.compile(_as_it_is, backend=backend, dynamic=False, fullgraph=True, options=options)
        self.compiled = True

    def stop_compiling(self) -> None:
        """Run the layers uncompiled from now on."""
        self._run, self.compiled = _as_it_is, False


class _Mark(torch.autograd.Function):
    """The identity at a layer's end; its backward is the first of the layer's, also before one that recomputes."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, sharded: ShardedLayers, number: int) -> torch.Tensor:
        ctx.sharded, ctx.number = sharded, number
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.sharded.backward(ctx.number)
        return gradient, None, None


def _marked(states: torch.Tensor, sharded: ShardedLayers, number: int) -> Any:
    return _Mark.apply(states, sharded, number)  # type: ignore[no-untyped-call] # torch has no types here


def _as_it_is(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _mark_tokens(arguments: Any) -> None:
    """Make the number of tokens a variable of compiled code: as a constant, each would have its own code."""
    tensors = [each for each in tree_leaves(arguments) if isinstance(each, torch.Tensor)]
    tokens = tensors[0].shape[1]  # the first is the hidden states: [1, T, hidden]
    for each in tensors:
        if each.ndim > 1 and each.shape[1] == tokens:
            torch._dynamo.maybe_mark_dynamic(each, 1)  # noqa: SLF001 - its public name


def digest_of(folder: Path) -> str:
    """Hash of the sources in a package's folder."""
    digest = sha256()
    for source in sorted(folder.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def variants_compiled() -> int:
    """Variants of code that were compiled so far in this process."""
    return int(counters["stats"]["unique_graphs"])


def reason_for_last(variants: int) -> str:
    """Why the code that was there did not do and so many more variants were compiled, in the compiler's words."""
    reasons = [" ".join(made.recompile_reason.split()) for made in get_compilation_metrics() if made.recompile_reason]
    return "; ".join(dict.fromkeys(reasons[-variants:])) or "the compiler names no reason"
