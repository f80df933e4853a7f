"""The base model in 4 bits: loaded tensor by tensor, and written as files that load without quantising."""

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

from job.core.base.mxfp4 import is_mxfp4
from job.core.base.promises import refuse
from job.core.errors import DataError
from job.tune.device.compute_dtype import dtype_of
from job.tune.model.config import CONFIG, causal_lm_of, read_config, read_whole_config, read_wrapper
from job.tune.model.experts import ExpertsApart
from job.tune.model.four_bit import (
    compute_in,
    is_another_in_four_bits,
    kept_in_fp32,
    quantisation,
    without_cpu_repacking,
    without_experts,
)
from job.tune.model.promises import filled, hold_to_promises
from job.tune.model.stored.mxfp4 import PUBLISHED, with_decoded
from job.tune.model.stored.tensor_files import Files, sharded, stored_tensors, tensors_bytes
from job.tune.model.wrappers import parts_of


def load_base(folder: Path, *, device: torch.device, dtype: torch.dtype, on_host: bool = False) -> Any:
    """The base in 4 bits (NF4, double quantisation), frozen; embeddings, norms and head in `dtype`.

    Tensor by tensor: from the file to the device, and there into 4 bits, so that the host's memory never holds more
    than one; of a mixture expert by expert, so that the device's does not either, and experts in MXFP4 are decoded so.
    A folder whose weights are in 4 bits already (see `quantised_files`) gives the same base to the bit.

    Frozen by hand: peft's prepare_model_for_kbit_training would make norms, embeddings and head fp32, which is slower
    and larger, and turn on checkpointing.

    Args:
        folder: with configuration and weights.
        device: computes.
        dtype: computes in it.
        on_host: leave every tensor in its file's pages, for a device that will get its own part of them; of a base
            that is in 4 bits already.

    Raises:
        DataError: the weights cannot be read, are not those of the model that the config describes, or are not finite.
    """
    if device.type == "cuda":
        # The adapter multiplies in fp32: with TF32 a step on an H200 is six times faster. Its inputs come from bf16,
        # which TF32 holds exactly; sums stay in fp32.
        torch.set_float32_matmul_precision("high")
        # A convolution's gradient is summed in an order that does not change, or a resumed run would be another.
        torch.backends.cudnn.deterministic = True
    config = read_config(folder)
    kind = causal_lm_of(config)
    quantised, not_finite = quantisation(dtype), set[str]()
    place = torch.device("cpu") if on_host else device
    try:
        tensors = stored_tensors(folder, place, not_finite=not_finite, in_pages=on_host)
        left = hold_to_promises(folder, {name: tensor.header for name, tensor in tensors.items()}, source=str(folder))
        form = getattr(config, "quantization_config", None)
        tensors = {**parts_of(read_whole_config(folder), tensors).text}
        done = left is not None and form == quantised.to_dict()
        if left is not None:
            config.quantization_config = {**config.quantization_config, "llm_int8_skip_modules": left}
        elif form is not None:
            del config.quantization_config  # left over by whoever saved it: nothing is in 4 bits
        if dtype is torch.float32 and left is None:
            # So that the base in 4 bits is the same on every processor, also one that was published in fp32.
            exact = kept_in_fp32(kind)
            tensors = {name: replace(each, in_bf16=not exact(name)) for name, each in tensors.items()}
        experts = ExpertsApart(config, with_decoded(tensors, place) if is_mxfp4(form, config.model_type) else tensors)
        with without_experts():
            model, found = filled(
                kind,
                config,
                experts.others,
                quantization_config=quantised if left is None else None,
                dtype=dtype,
                device_map={"": place},
            )
        experts.fill(model, device=place, dtype=dtype)
    except SafetensorError as error:
        raise DataError(f"{folder}: a weights file is damaged ({error}); fetch the base model again") from error
    refuse(found, source=str(folder))  # also of a copy: what the files lack was made up at random
    refuse_not_finite(not_finite, folder)
    model.requires_grad_(False)  # noqa: FBT003 - torch's signature
    without_cpu_repacking(model)
    if left is not None and not done:
        compute_in(model, dtype)
    model.config.use_cache = False
    # `generate` takes what we leave open from here: a base's own sampling rules or repetition penalty.
    model.generation_config = GenerationConfig()
    return model


def refuse_not_finite(names: Collection[str], folder: Path) -> None:
    """Raise what tensors were found to hold.

    Raises:
        DataError: a value that is NaN or infinite.
    """
    if names:
        raise DataError(
            f"{folder}: not every number in the weights is finite: NaN or infinity in {min(names)}, in {len(names):,} "
            "of all tensors; nothing can be learned from that: copy the model again, or choose another model.base"
        )


def quantised_files(base: Any, folder: Path) -> Files:
    """A base that `load_base` has just loaded, as files that it reads again without quantising.

    Args:
        base: with nothing added to it yet; of a multimodal model they hold its decoder alone, under the whole's names.
        folder: where it was loaded from.
    """
    yield quantised_config(folder, dtype_of(base))
    wrapper = read_wrapper(folder)
    name = str if wrapper is None else wrapper.outside
    yield from sharded({name(each): tensor for each, tensor in _tensors(base).items()})


def quantised_config(folder: Path, dtype: torch.dtype) -> tuple[str, Callable[[], bytes]]:
    """The file that says of a base in a folder that its weights are in 4 bits."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    published = {PUBLISHED: config[_FORM]} if _FORM in config else {}
    return CONFIG, json.dumps({**config, **published, _FORM: quantisation(dtype).to_dict()}, indent=2).encode


def quantised_bytes(base: Any) -> int:
    """Bytes of the tensors in those files."""
    return tensors_bytes(_tensors(base))


def is_quantised(folder: Path) -> bool:
    """Whether the weights in a folder are in the 4 bits that are trained on already, as its config says."""
    config = read_config(folder)
    form = getattr(config, _FORM, None)
    return form is not None and not is_mxfp4(form, config.model_type)


_FORM = "quantization_config"
"""Where a config says how it is quantised."""


def is_in_four_bits(folder: Path) -> bool:
    """Whether they are in truth, by their files, in 4 bits that this job reads."""
    tensors = stored_tensors(folder, torch.device("cpu"), not_finite=set())
    headers = {name: tensor.header for name, tensor in tensors.items()}
    return hold_to_promises(folder, headers, source=str(folder)) is not None


def has_experts_in_16_bits(folder: Path) -> bool:
    """Whether experts have to be put into 4 bits while they are loaded, as in bases that others have put into them."""
    tensors = stored_tensors(folder, torch.device("cpu"), not_finite=set())
    experts = ExpertsApart(read_config(folder), parts_of(read_whole_config(folder), tensors).text)
    return not experts.are_in_four_bits


def can_be_kept(base: Any) -> bool:
    """Whether `quantised_files` of a base are read as the same model: of some, transformers makes another one then."""
    return not is_another_in_four_bits(base)


def _tensors(base: Any) -> dict[str, Tensor]:
    """Packed weights with their quantisation state, and all that is not in 4 bits; a tied head only once."""
    once = {name for name, _ in base.named_parameters()}
    twice = {name for name, _ in base.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in base.state_dict().items() if name not in twice}
