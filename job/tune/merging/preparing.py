"""What is to be done to a base's files, before any of it is done: names, shapes and forms are held to each other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.core.base.promises import STATE
from job.core.errors import DataError
from job.core.reports.onto import Onto
from job.tune.device.compute_dtype import compute_dtype
from job.tune.merging.factors import AdapterFile
from job.tune.merging.files import MergedWeights, Merger, Untied
from job.tune.merging.origins import Origins, tensors_in
from job.tune.model.config import empty_model, read_config, read_whole_config
from job.tune.model.four_bit import put_into_four_bits, through_four_bits
from job.tune.model.mixtures import experts_modules, weights_of_experts
from job.tune.model.wrappers import Wrapper, parts_of, wrapper_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A merge that can begin."""

    weights: MergedWeights
    untied: bool
    """Whether head and embeddings were one tensor in the base, and are two from now on."""
    not_finite: set[str]
    """Gets the name of each tensor of the base that is read and holds a value that is NaN or infinite."""


def prepare_merge(base: Path, adapter: Path, config: Path, *, onto: Onto, device: torch.device) -> Prepared:
    """Look at headers and configs alone.

    Args:
        base: the folder with the base's files.
        adapter: the adapter's tensors.
        config: its adapter_config.json.
        onto: the base's own weights, or what they become in 4 bits.
        device: that puts them into 4 bits.

    Raises:
        DataError: adapter and base do not go together.
    """
    text, whole, not_finite = read_config(base), read_whole_config(base), set[str]()
    tensors = tensors_in(base, not_finite=not_finite)
    decoder, wrapper = empty_model(text), wrapper_of(whole)
    file = AdapterFile(adapter, config, empty_model(text) if wrapper is None else wrapper.whole)
    inside = _inside(wrapper_of(whole), adapter)
    names = {id(module): name for name, module in decoder.named_modules()}
    embeddings, head = (
        f"{names[id(module)]}.weight" for module in (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    )
    adapted = {inside(name) for name in file.parameters()}
    untied = None
    if text.tie_word_embeddings and adapted & {embeddings, head}:
        in_files = head if wrapper is None else wrapper.outside(head)
        untied = Untied(embeddings=embeddings, head=head, in_files=in_files)
    origins = Origins(decoder, parts_of(whole, tensors).text)
    refuse_copied_experts(decoder, origins)
    merger = Merger(
        origins=origins,
        adapter=file,
        inside=inside,
        through=_through(text, device, packed=any(STATE in name for name in tensors)) if onto == "quantised" else {},
        untied=untied,
    )
    return Prepared(weights=MergedWeights(merger, tensors), untied=untied is not None, not_finite=not_finite)


def _inside(wrapper: Wrapper | None, adapter: Path) -> Callable[[str], str]:
    def inside(name: str) -> str:
        found = name if wrapper is None else wrapper.inside(name)
        if found is None:
            raise DataError(f"{adapter}: {name} is no part of the text decoder; the adapter is another model's")
        return found

    return inside


def refuse_copied_experts(decoder: Any, origins: Origins) -> None:
    """Raise where a base holds its experts in the 4 bits that this job keeps for itself.

    Raises:
        DataError: nobody else reads them so, and no merged file could be of the base's own cut.
    """
    for name in _experts(decoder):
        if origins.is_packed(name):
            raise DataError(
                f"{name}: the base is a copy that this job has made, with its experts in 4 bits; only a run on "
                "the base that such a copy was made of can be exported"
            )


def _experts(model: Any) -> dict[str, bool]:
    """Name of each parameter of experts that training puts into 4 bits -> whether their matrices are [in, out]."""
    found: dict[str, bool] = {}
    for path, module in experts_modules(model):
        found |= dict.fromkeys((f"{path}.{name}" for name in weights_of_experts(module)), bool(module.is_transposed))
    return found


def _through(config: Any, device: torch.device, *, packed: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """What training puts into 4 bits -> into them and back, as the base is loaded.

    Args:
        config: the decoder's.
        device: that puts weights into 4 bits.
        packed: whether linear layers are in 4 bits in the files: then only experts are put into them, as they stand;
            else in bf16, also where fp32 is computed.
    """
    dtype, model = compute_dtype(device), empty_model(config)

    def through(value: Tensor) -> Tensor:
        rounded = value if packed else value.bfloat16()
        return through_four_bits(rounded.to(device=device, dtype=dtype)).cpu()

    def turned(value: Tensor) -> Tensor:
        return through(value.t()).t()

    found: dict[str, Callable[[Tensor], Tensor]] = {}
    found |= {name: turned if transposed else through for name, transposed in _experts(model).items()}
    if not packed:
        found |= {f"{name}.weight": through for name in put_into_four_bits(model, None)}
    return found
