"""What is to be done to a base's files, before any of it is done: names, shapes and forms are held to each other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from job.core.errors import DataError
from job.core.onto import Onto
from job.tune.device.compute_dtype import compute_dtype
from job.tune.merging.factors import AdapterFile
from job.tune.merging.files import MergedWeights, Merger, Untied
from job.tune.merging.origins import Origins
from job.tune.model.config import empty_model, read_config, read_whole_config
from job.tune.model.four_bit import put_into_four_bits, through_four_bits
from job.tune.model.stored.tensor_files import stored_tensors
from job.tune.model.wrappers import Wrapper, parts_of, wrapper_of

_CPU = torch.device("cpu")


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
    tensors = stored_tensors(base, _CPU, not_finite=not_finite)
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
    is_packed = getattr(text, "quantization_config", None) is not None
    merger = Merger(
        origins=Origins(decoder, parts_of(whole, tensors).text),
        adapter=file,
        inside=inside,
        quantised=_quantised(base) if onto == "quantised" and not is_packed else lambda _: False,
        through=_through(device),
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


def _quantised(base: Path) -> Callable[[str], bool]:
    """Whether a parameter is in 4 bits in training."""
    modules = put_into_four_bits(empty_model(read_config(base)), None)
    names = {f"{name}.weight" for name in modules}
    return names.__contains__


def _through(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Into 4 bits and back, as the base is loaded: in bf16, also where fp32 is computed."""
    dtype = compute_dtype(device)

    def through(value: Tensor) -> Tensor:
        return through_four_bits(value.bfloat16().to(device=device, dtype=dtype)).cpu()

    return through
