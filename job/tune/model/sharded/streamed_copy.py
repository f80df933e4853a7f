"""A base put into 4 bits from file to file, tensor by tensor: no device ever holds the base."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from job.core.base.mxfp4 import is_mxfp4
from job.core.errors import UsageError
from job.tune.model.base import can_be_kept, quantised_config, refuse_not_finite
from job.tune.model.config import causal_lm_of, empty_model, read_config, read_whole_config, read_wrapper
from job.tune.model.experts import ExpertsApart
from job.tune.model.four_bit import kept_in_fp32, packed_tensors, put_into_four_bits
from job.tune.model.mixtures import take_out_experts
from job.tune.model.promises import hold_to_promises
from job.tune.model.stored.mxfp4 import with_decoded
from job.tune.model.stored.tensor_files import Files, StoredTensor, content_of, index_of, stored_tensors
from job.tune.model.wrappers import parts_of

_FILE_BYTES = 2**29
"""Bytes of 16-bit weights that become one file. Several are made at once, in memory and on the device."""
_BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
"""What stands beside a weight in 4 bits: needed before there is one, for the index."""


class StreamedCopy:
    """The files that `quantised_files` gives of a base that is loaded: the same tensors to the bit."""

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        """No weight is read yet.

        Args:
            folder: of the base, not in 4 bits.
            device: quantises.
            dtype: what the base will compute in.

        Raises:
            DataError: the files are not those of the model that the config describes.
            UsageError: this model's tensors are not those of its files, one by one.
        """
        self._folder, self._device, self._dtype = folder, device, dtype
        self._not_finite: set[str] = set()
        stored = stored_tensors(folder, device, not_finite=self._not_finite)
        hold_to_promises(folder, {name: each.header for name, each in stored.items()}, source=str(folder))
        config = read_config(folder)
        form = getattr(config, "quantization_config", None)
        if form is not None:
            del config.quantization_config
        self._exact = kept_in_fp32(causal_lm_of(config))
        text = parts_of(read_whole_config(folder), stored).text
        text = {name: self._rounded(name, each) for name, each in text.items()}
        in_mxfp4 = is_mxfp4(form, config.model_type)
        self._experts = ExpertsApart(config, with_decoded(text, device) if in_mxfp4 else text)
        model = empty_model(config)
        take_out_experts(model)
        _tie(model, config)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        turned = any(isinstance(module, Conv1D) for module in model.modules())
        linear = put_into_four_bits(model, None)
        self._empty: dict[str, Any] = {f"{name}.weight": module.weight for name, module in linear.items()}
        others = {self._experts.names.get(name, name): each for name, each in self._experts.others.items()}
        self._tensors: Mapping[str, StoredTensor] = {name: others[name] for name in shapes if name in others}
        if turned or not can_be_kept(model) or not _is_one_by_one(model, shapes, self._tensors):
            raise UsageError(
                f"--base-placement sharded: the tensors of {config.model_type} are put together while it is loaded, "
                "which a single GPU must do; use GPUs that hold the whole base, or a base that is published in 4 bits"
            )

    @property
    def needed_bytes(self) -> int:
        """What all files take, about."""
        whole = {name: math.prod(each.header.shape) for name, each in self._tensors.items()}
        others = sum(size * 9 // 16 if name in self._empty else 4 * size for name, size in whole.items())
        return others + sum(shape.numel() * 9 // 16 + 2000 for shape in self._experts.shapes.values())

    def files(self) -> Files:
        """Each file is made when its content is asked for, on any thread."""
        yield quantised_config(self._folder, self._dtype)
        wrapper = read_wrapper(self._folder)
        outside: Callable[[str], str] = str if wrapper is None else wrapper.outside
        groups: list[list[str]] = [[]]
        size = 0
        for name, more in self._sizes():
            if groups[-1] and size + more > _FILE_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += more
        places: dict[str, str] = {}
        for number, names in enumerate(groups, start=1):
            file = f"model-{number:05d}.safetensors"
            places |= {outside(part): file for name in names for part in self._parts(name)}
            yield file, partial(self._content, names, outside)
        yield index_of(places)

    def check(self) -> None:
        """After all files were made.

        Raises:
            DataError: a value of the base is NaN or infinite.
        """
        refuse_not_finite(self._not_finite, self._folder)

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """Each parameter, and its bytes before it is quantised."""
        yield from ((name, tensor.header.bytes) for name, tensor in self._tensors.items())
        yield from ((name, 2 * shape.numel()) for name, shape in self._experts.shapes.items())

    def _parts(self, name: str) -> list[str]:
        packed = name in self._empty or name in self._experts.shapes
        return [name, *(f"{name}.{part}" for part in _BESIDE)] if packed else [name]

    def _content(self, names: list[str], outside: Callable[[str], str]) -> bytes:
        made: dict[str, Tensor] = {}
        for name in names:
            made |= {outside(part): tensor.cpu() for part, tensor in self._made(name).items()}
        return content_of(made)

    def _rounded(self, name: str, tensor: StoredTensor) -> StoredTensor:
        """As the base is on every processor."""
        return replace(tensor, in_bf16=self._dtype is torch.float32 and not self._exact(name))

    def _made(self, name: str) -> dict[str, Tensor]:
        if name in self._experts.shapes:
            return self._experts.stored(name, device=self._device, dtype=self._dtype)
        value = self._tensors[name][...].to(self._device)
        if self._exact(name):
            return {name: value.float()}
        value = value.to(self._dtype)
        return packed_tensors(name, self._empty[name], value) if name in self._empty else {name: value}


def _tie(model: Any, config: Any) -> None:
    if config.tie_word_embeddings:
        model.tie_weights()


def _is_one_by_one(model: Any, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether each parameter is one tensor of the files under its own name, and there is no other state."""
    own = dict(model.named_parameters())
    same = shapes.keys() == tensors.keys() and all(tensors[name].header.shape == shapes[name] for name in shapes)
    buffers = {name for name, _ in model.named_buffers()}
    return same and own.keys() == shapes.keys() and not buffers & model.state_dict().keys()
