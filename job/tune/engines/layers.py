"""How the decoder's layers run: as they are or compiled, with activations kept or computed again on the way back."""

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import config as compiler
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from job import kernels as engine

_MOST_VARIANTS = 192
"""Of a layer's code, by size and by kind of layer; a model that needs more would be compiled all the time."""


class LayerForwards:
    """Swaps the forward of single layers of one model; compiled code runs only where there is a way back."""

    def __init__(self, causal_lm: Any) -> None:
        self._layers = [module for module in causal_lm.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._run = _as_it_is
        self.recomputing = False
        """Whether activations are computed again on the way back."""
        self.compiled = False
        for layer in self._layers:
            layer.forward = partial(self._forward, layer)

    def __bool__(self) -> bool:
        return bool(self._layers)

    def _forward(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return _as_it_is(layer, *args, **kwargs)
        if self.recomputing:
            return checkpoint(self._run, layer, *args, use_reentrant=False, **kwargs)
        return self._run(layer, *args, **kwargs)

    def compile(self, backend: str) -> None:
        """From now on; all layers of one kind share their code.

        Compiled at the first call: that raises where the compiler refuses, or at one variant too many.
        """
        compiler.recompile_limit = _MOST_VARIANTS
        # A cache on disk is keyed by what the compiler saw, and our ops' ways back are not part of that.
        torch.compiler.config.cache_key_tag = digest_of(Path(engine.__path__[0]))
        options: Any = None
        if backend == "inductor" and hasattr(inductor, "deterministic"):
            # By rule, not by the clock: another start must choose the same kernels, whose sums have the same order.
            options = {"deterministic": True}
        self._run = torch.compile(_as_it_is, backend=backend, dynamic=False, fullgraph=True, options=options)
        self.compiled = True

    def stop_compiling(self) -> None:
        """From now on as they are."""
        self._run, self.compiled = _as_it_is, False


def _as_it_is(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def digest_of(folder: Path) -> str:
    """Of a package's own sources."""
    digest = sha256()
    for source in sorted(folder.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def variants_compiled() -> int:
    """So far in this process."""
    return int(counters["stats"]["unique_graphs"])
