"""The base model in 4 bits: loaded tensor by tensor, and written as files that load without quantising."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from job.core.errors import DataError
from job.core.promises import refuse
from job.tune.device.compute_dtype import dtype_of
from job.tune.model.config import CONFIG, causal_lm_of, read_config, read_whole_config, read_wrapper
from job.tune.model.experts import ExpertsApart
from job.tune.model.four_bit import compute_in, kept_in_fp32, quantisation, without_cpu_repacking, without_experts
from job.tune.model.promises import filled, hold_to_promises
from job.tune.model.tensor_files import Files, sharded, stored_tensors, tensors_bytes
from job.tune.model.wrappers import parts_of


def load_base(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The base in 4 bits (NF4, double quantisation), frozen; embeddings, norms and head in `dtype`.

    Tensor by tensor: from the file to the device, and there into 4 bits, so that the host's memory never holds more
    than one; of a mixture expert by expert, so that the device's does not either. A folder whose weights are in 4 bits
    already (see `quantised_files`) gives the same base to the bit.

    Frozen by hand: peft's prepare_model_for_kbit_training would make norms, embeddings and head fp32, which is slower
    and larger, and turn on checkpointing.

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
    try:
        tensors = stored_tensors(folder, device, not_finite=not_finite)
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
        experts = ExpertsApart(config, tensors)
        with without_experts():
            model, found = filled(
                kind,
                config,
                experts.others,
                quantization_config=quantised if left is None else None,
                dtype=dtype,
                device_map={"": device},
            )
        experts.fill(model, device=device, dtype=dtype)
    except SafetensorError as error:
        raise DataError(f"{folder}: a weights file is damaged ({error}); fetch the base model again") from error
    refuse(found, source=str(folder))  # also of a copy: what the files lack was made up at random
    _refuse_not_finite(not_finite, folder)
    model.requires_grad_(False)  # noqa: FBT003 - torch's signature
    without_cpu_repacking(model)
    if left is not None and not done:
        compute_in(model, dtype)
    model.config.use_cache = False
    # `generate` takes what we leave open from here: a base's own sampling rules or repetition penalty.
    model.generation_config = GenerationConfig()
    return model


def _refuse_not_finite(names: Collection[str], folder: Path) -> None:
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
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    form = quantisation(dtype_of(base)).to_dict()
    yield CONFIG, json.dumps(config | {"quantization_config": form}, indent=2).encode
    wrapper = read_wrapper(folder)
    name = str if wrapper is None else wrapper.outside
    yield from sharded({name(each): tensor for each, tensor in _tensors(base).items()})


def quantised_bytes(base: Any) -> int:
    """Bytes of the tensors in those files."""
    return tensors_bytes(_tensors(base))


def is_quantised(folder: Path) -> bool:
    """Whether the weights in a folder are in fewer bits already, as its config says."""
    return getattr(read_config(folder), "quantization_config", None) is not None


def can_be_kept(base: Any) -> bool:
    """Whether `quantised_files` of a base are read as the same model: of some, transformers makes another one then."""
    return not any(type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION for module in base.modules())


def _tensors(base: Any) -> dict[str, Tensor]:
    """Packed weights with their quantisation state, and all that is not in 4 bits; a tied head only once."""
    once = {name for name, _ in base.named_parameters()}
    twice = {name for name, _ in base.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in base.state_dict().items() if name not in twice}
