"""A decoder in 16 bits of which one layer is in memory while it computes: what the proof of a merged model needs."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GenerationConfig

from job.core.errors import DataError
from job.tune.merging.origins import Origins, tensors_in
from job.tune.model.config import causal_lm_of, empty_model, read_config, read_whole_config
from job.tune.model.four_bit import kept_in_fp32
from job.tune.model.wrappers import parts_of

_ROOM = 4
"""On a GPU layers stay while more than one part in so many of its memory is free."""


def origins_of(folder: Path, *, not_finite: set[str]) -> Origins:
    """Where the parameters of the decoder in a folder come from.

    Args:
        folder: a base's, or a merged model's.
        not_finite: gets the name of each tensor that is read and holds a value that is NaN or infinite.
    """
    tensors, config = tensors_in(folder, not_finite=not_finite), read_config(folder)
    return Origins(empty_model(config), parts_of(read_whole_config(folder), tensors).text)


class Layered:
    """A causal language model without values, which takes them from files: all but its layers at once."""

    def __init__(self, config: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        """Without values, and without an adapter.

        Args:
            config: of the decoder.
            device: where it computes.
            dtype: what it computes in.
        """
        kind = causal_lm_of(config)
        config.tie_word_embeddings = False  # each takes its own values; of a tied base they are the same
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it is dequantised where it is read
        with init_empty_weights(include_buffers=False):  # rotations and the like are in no file
            self.model: Any = kind._from_config(config, dtype=dtype, attn_implementation="eager")  # noqa: SLF001 - the class's own way
        self.model.eval().requires_grad_(False)  # noqa: FBT003 - torch's signature
        self.model.config.use_cache = False
        self.model.generation_config = GenerationConfig()
        self._device, self._dtype, self._exact = device, dtype, kept_in_fp32(kind)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        names = {id(module): name for name, module in self.model.named_modules()}
        self._embeddings = f"{names[id(self.model.get_input_embeddings())]}.weight"
        self._head = f"{names[id(self.model.get_output_embeddings())]}.weight"
        self._shared = _shared(self.model)
        self._origins: Origins | None = None
        self._is_tied = False
        self._layers = [*_outermost_lists(self.model)]
        """Each with its name; found before an adapter puts modules between."""
        for name, layer in self._layers:
            layer.register_forward_pre_hook(self._before(name, layer))
            layer.register_forward_hook(self._after(name, layer))

    def read_from(self, folder: Path, *, not_finite: set[str]) -> None:
        """Take all values from the files of this folder from now on.

        Args:
            folder: the base's, or that of a model with the same parameters.
            not_finite: gets the name of each tensor that is read and holds a value that is NaN or infinite.

        Raises:
            DataError: a value that the model needs is not in the files.
        """
        self._origins = origins_of(folder, not_finite=not_finite)
        self._is_tied = bool(read_config(folder).tie_word_embeddings)
        for name, layer in self._layers:
            self._drop(name, layer)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what the allocator keeps would count as taken
        self._fill("", self.model, but=tuple(f"{name}." for name, _ in self._layers))

    def _before(self, name: str, layer: nn.Module) -> Callable[..., None]:
        def bring(*_: Any) -> None:
            self._fill(f"{name}.", layer, but=())

        return bring

    def _after(self, name: str, layer: nn.Module) -> Callable[..., None]:
        def drop(*_: Any) -> None:
            if not self._has_room():
                self._drop(name, layer)

        return drop

    def _has_room(self) -> bool:
        if self._device.type != "cuda":
            return False
        free, total = torch.cuda.mem_get_info(self._device)
        return free * _ROOM > total

    def _fill(self, prefix: str, module: nn.Module, *, but: tuple[str, ...]) -> None:
        for holder, key, name in _places(module, prefix):
            own = getattr(holder, key)
            if name.startswith(but or "\0") or (prefix and not own.is_meta and key in holder._parameters):  # noqa: SLF001 - its place
                continue
            if key in holder._buffers and name not in self._files():  # noqa: SLF001 - as above
                continue  # it was made with the model
            value = self._value(name).to(self._device)
            if value.is_floating_point():
                value = value.to(torch.float32 if self._exact(name) else self._dtype)
            if value.shape != own.shape:
                raise DataError(f"{name}: is {[*value.shape]} in the files, and {[*own.shape]} in the model")
            if key in holder._parameters:  # noqa: SLF001 - as above
                holder._parameters[key] = nn.Parameter(value, requires_grad=False)  # noqa: SLF001 - as above
            else:
                holder._buffers[key] = value  # noqa: SLF001 - as above

    def _value(self, name: str) -> Tensor:
        origins = self._files()
        if self._is_tied and name == self._head:
            return origins.parameter(self._embeddings)
        found = next((each for each in (name, *self._shared.get(name, ())) if each in origins), None)
        if found is None:
            raise DataError(f"{name}: is not in the files; copy the base again")
        return origins.parameter(found)

    def _files(self) -> Origins:
        assert self._origins is not None, "read_from comes first"
        return self._origins

    def _drop(self, name: str, layer: nn.Module) -> None:
        for holder, key, _ in _places(layer, f"{name}."):
            if key in holder._parameters:  # noqa: SLF001 - its place
                empty = torch.empty_like(getattr(holder, key), device="meta")
                holder._parameters[key] = nn.Parameter(empty, requires_grad=False)  # noqa: SLF001 - as above


def give_memory(model: PeftModel, device: torch.device) -> None:
    """Give an adapter that was attached to a model without values memory for its own."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for part in (module.lora_A, module.lora_B, module.lora_embedding_A, module.lora_embedding_B):
                part.to_empty(device=device)


def _places(module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Where each parameter and buffer of a base stands, and its name without what an adapter put between."""
    for path, holder in module.named_modules():
        if "lora_" in path:
            continue
        for key in [*holder._parameters, *holder._buffers]:  # noqa: SLF001 - also those that are to be replaced
            if not key.startswith("lora_") and getattr(holder, key) is not None:
                yield holder, key, _plain_name(f"{prefix}{path}.{key}" if path else f"{prefix}{key}")


def _plain_name(name: str) -> str:
    return name.replace(".base_layer", "")


def _outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the lists that are in no other one: the decoder's layers."""
    found: Collection[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{each}." for each in found) or "\0"):
            found = [*found, name]
            yield from ((f"{name}.{key}", layer) for key, layer in module.named_children())


def _shared(model: nn.Module) -> dict[str, list[str]]:
    """Name of each parameter that has several -> all of them: files have one of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: found for found in names.values() if len(found) > 1 for name in found}
