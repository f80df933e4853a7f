"""The base model in 4 bits: loaded tensor by tensor, and written as files that load without quantising."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

from job.core.errors import DataError
from job.tune.device.compute_dtype import dtype_of
from job.tune.model.config import CONFIG, read_config
from job.tune.model.four_bit import compute_in, quantisation, without_cpu_repacking
from job.tune.model.tensor_files import Files, StoredTensor, sharded, stored_tensors, tensors_bytes


def load_base(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The base in 4 bits (NF4, double quantisation), frozen; embeddings, norms and head in `dtype`.

    Tensor by tensor: from the file to the device, and there into 4 bits, so that the host's memory never holds more
    than one. A folder whose weights are in 4 bits already (see `quantised_files`) gives the same base to the bit.

    Frozen by hand: peft's prepare_model_for_kbit_training would make norms, embeddings and head fp32, which is slower
    and larger, and turn on checkpointing.

    Raises:
        DataError: the weights cannot be read, or the config describes a model that they are far too small for.
    """
    if device.type == "cuda":
        # The adapter multiplies in fp32: with TF32 a step on an H200 is six times faster. Its inputs come from bf16,
        # which TF32 holds exactly; sums stay in fp32.
        torch.set_float32_matmul_precision("high")
    config, quantised = AutoConfig.from_pretrained(folder, trust_remote_code=False), quantisation(dtype)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config = config if isinstance(config, kind.config_class) else config.get_text_config()
    done = getattr(config, "quantization_config", None) == quantised.to_dict()
    try:
        tensors = stored_tensors(folder, device)
        if dtype is torch.float32 and not hasattr(config, "quantization_config"):
            # So that the base in 4 bits is the same on every processor, also one that was published in fp32.
            exact = _kept_in_fp32(kind)
            tensors = {name: replace(each, in_bf16=not exact(name)) for name, each in tensors.items()}
        _refuse_other_sizes(config.get_text_config(), tensors, folder)
        model = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            quantization_config=None if done else quantised,
            dtype=dtype,
            device_map={"": device},
            attn_implementation="eager",
            local_files_only=True,
        )
    except SafetensorError as error:
        raise DataError(f"{folder}: a weights file is damaged ({error}); fetch the base model again") from error
    model.requires_grad_(False)  # noqa: FBT003 - torch's signature
    without_cpu_repacking(model)
    if hasattr(config, "quantization_config") and not done:
        compute_in(model, dtype)
    model.config.use_cache = False
    # `generate` takes what we leave open from here: a base's own sampling rules or repetition penalty.
    model.generation_config = GenerationConfig()
    return model


def _kept_in_fp32(kind: Any) -> Callable[[str], bool]:
    """Whether a tensor keeps fp32 where bf16 computes, as some routers and decays do."""
    names = kind._keep_in_fp32_modules_strict or ()  # noqa: SLF001 - transformers' own list
    return lambda name: any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in names)


def _refuse_other_sizes(config: Any, tensors: Mapping[str, StoredTensor], folder: Path) -> None:
    """What the files lack would be made up at random, and takes memory: hold the config against their headers.

    The embedding is never in 4 bits, and a layer has a tensor at least: both hold for every decoder.
    """
    largest = max((tensor.values for tensor in tensors.values()), default=0)
    embedding = config.vocab_size * config.hidden_size
    if embedding > largest:
        told = f"an embedding of {config.vocab_size:,} x {config.hidden_size:,} numbers"
        found = f"the largest tensor of the weights has {largest:,}"
    elif config.num_hidden_layers > len(tensors):
        told, found = f"{config.num_hidden_layers:,} layers", f"the weights are {len(tensors):,} tensors"
    else:
        return
    raise DataError(f"{folder}/{CONFIG}: describes {told}, but {found}; copy the model again")


def quantised_files(base: Any, folder: Path) -> Files:
    """A base that `load_base` has just loaded, as files that it reads again without quantising.

    Args:
        base: with nothing added to it yet.
        folder: where it was loaded from.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    form = quantisation(dtype_of(base)).to_dict()
    yield CONFIG, json.dumps(config | {"quantization_config": form}, indent=2).encode
    yield from sharded(_tensors(base))


def quantised_bytes(base: Any) -> int:
    """Bytes of the tensors in those files."""
    return tensors_bytes(_tensors(base))


def is_quantised(folder: Path) -> bool:
    """Whether the weights in a folder are in fewer bits already, as its config says."""
    return getattr(read_config(folder), "quantization_config", None) is not None


def _tensors(base: Any) -> dict[str, Tensor]:
    """Packed weights with their quantisation state, and all that is not in 4 bits; a tied head only once."""
    once = {name for name, _ in base.named_parameters()}
    twice = {name for name, _ in base.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in base.state_dict().items() if name not in twice}
