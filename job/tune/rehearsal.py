"""A base's family tried before the base is fetched: a tiny random copy of its config goes through the self-test."""

import gc
import importlib.metadata
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from job.core.errors import JobError, UsageError
from job.core.recipe.schema import LoraSection
from job.kernels import decoder
from job.tune.device.failures import error_line
from job.tune.engines import choice
from job.tune.engines.choice import choose_engine
from job.tune.engines.families import IN_WORDS, is_supported
from job.tune.engines.layers import digest_of
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model
from job.tune.model import adapter
from job.tune.model.adapter import attach_lora
from job.tune.model.base import load_base
from job.tune.model.config import empty_model
from job.tune.model.shrunk import fewest_heads, shrunk

_CPU = torch.device("cpu")
_MOST_PARAMETERS = 10**8
"""Of the copy: with more it would take longer than anybody waits."""


def rehearse(config: Any, lora: LoraSection) -> str:
    """Load, quantise and adapt a random copy, and hold the engines to the model's own loss and gradients.

    Args:
        config: of a decoder.
        lora: the recipe's section.

    Returns:
        What was tried and how it trains, or why nothing could be tried.

    Raises:
        UsageError: this job does not compute what the model does, or transformers' code for it does not run.
    """
    kind, why = config.model_type, ""
    for heads in dict.fromkeys((fewest_heads(config), 8, config.num_attention_heads)):
        try:
            small = shrunk(config, heads=heads)
            parameters = sum(each.numel() for each in empty_model(small).parameters())
            if parameters > _MOST_PARAMETERS:
                why = why or f"the smallest copy of this {kind} has {parameters:,} parameters"
                break
            with _copy(small) as folder, _seeded():
                how = _how(folder, lora)
        except Exception as error:
            if isinstance(error, JobError) and error.__cause__ is None:
                raise UsageError(f"model.base: tried as a small random {kind}: {error}") from error
            # Sizes that do not go together fail in any way; with all of its heads it is the family's own code.
            why = f"no small copy of this {kind} works ({error_line(error)})"
            if heads == config.num_attention_heads:
                raise UsageError(f"model.base: {kind}: {why}; use another base") from error
        else:
            layers = f"{small.num_hidden_layers} layers"
            return f"a random {kind} of {layers}: loss its own, documents apart, every adapter learns; {how}"
        finally:
            gc.collect()
    return f"not tried: {why}; `run` tries the base itself"


def depends_on(config: Any, lora: LoraSection) -> dict[str, Any]:
    """All that can change what `rehearse` returns: the config, the adapter, the libraries, and our own code."""
    code = [digest_of(Path(choice.__file__).parent), digest_of(Path(adapter.__file__).parent)]
    return {
        "config": config.to_dict(),
        "lora": lora.model_dump(mode="json"),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "code": [*code, digest_of(Path(decoder.__file__).parent)],
    }


_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def _how(folder: Path, lora: LoraSection) -> str:
    base = load_base(folder, device=_CPU, dtype=torch.float32)
    model = PackedModel(attach_lora(base, lora, source="random", revision=None, seed=0))
    check_model(model)
    if is_supported(base.config):
        try:
            choose_engine(model, "fast", backward=torch.autograd.backward)
        except UsageError as error:
            return f"not by the fast engine: {error}"
        return "both engines agree"
    chosen = choose_engine(model, "generic", backward=torch.autograd.backward)
    rows = IN_WORDS[model.rows]
    return f"{rows}, linear layers PEFT's own: slower" if chosen.left_to_peft else rows


@contextmanager
def _copy(config: Any) -> Iterator[Path]:
    """A folder with the config and random weights, none of which does nothing: no norm of ones, no bias of zeros."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        with _seeded():
            model = type(empty_model(config))._from_config(config, dtype=torch.float32)  # noqa: SLF001 - as AutoModel does
            for parameter in model.parameters():
                if bool((parameter == parameter.flatten()[0]).all()):
                    nn.init.normal_(parameter, mean=float(parameter.detach().flatten()[0]), std=0.2)
            model.save_pretrained(folder)
            del model
        yield folder


@contextmanager
def _seeded() -> Iterator[None]:
    """The same numbers each time; random generators are left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
