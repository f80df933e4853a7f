"""A model's tensors in safetensors files: read one at a time when they are asked for, and written a shard at a time."""

import ctypes
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from job.core.base.promises import TensorHeader

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_BYTES = 64 * 2**20
"""Bytes of a file that is written. It is in memory twice, and several are made at once: a gigabyte for eight."""
_EXPONENTS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
"""Whole numbers of the same width, and those bits which are all set in NaN and infinity, and in nothing else."""
_PIECE = 2**20
"""Values that are looked at at once: they stay in the processor's cache."""
Files = Iterator[tuple[str, Callable[[], bytes]]]
"""Name of each file, and what makes its content: callable on any thread, and several at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a file. It is mapped while it is read, and no longer than until the tensor is on its device.

    With one mapping for all of a file, as is usual, each page that was touched counts as this process's memory until
    the last tensor is loaded: in the end all of the model. Reading in place of mapping takes twice the time.
    """

    file: Path
    name: str
    header: TensorHeader
    on_cpu: bool
    """Whether it stays on the host: then it is copied, or the model would live in the file's own pages."""
    in_bf16: bool = False
    """Whether its values are rounded to bf16, as they are where bf16 computes."""
    mapped: Any = field(default=None, repr=False)
    """The open file, where tensors are left in its pages: one mapping for all; None: it is opened for each."""
    not_finite: set[str] = field(repr=False)
    """Gets the tensor's name when a value of it is NaN or infinite: who loads it has threads that raise nothing."""

    def __getitem__(self, index: Any) -> Tensor:
        if self.on_cpu:
            _give_back_freed_memory()
        if self.mapped is not None:
            part: Tensor = self.mapped.get_slice(self.name)[index]
        else:
            with safe_open(self.file, framework="pt") as file:
                part = file.get_slice(self.name)[index]
        if not is_finite(part):
            self.not_finite.add(self.name)
        if self.in_bf16 and part.is_floating_point():
            return part.bfloat16().to(part.dtype)
        return part.clone() if self.on_cpu else part

    def get_dtype(self) -> str:
        """The dtype, under the name by which transformers asks a slice of safetensors for it."""
        return self.header.dtype


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is, by the bits of the exponent, a piece at a time: exact also where no bf16 is computed."""
    if tensor.dtype not in _EXPONENTS:
        return True
    whole, exponent = _EXPONENTS[tensor.dtype]
    bits = tensor.reshape(-1).view(whole)
    return all(int((piece & exponent).max()) != exponent for piece in torch.split(bits, _PIECE) if piece.numel())


def _give_back_freed_memory() -> None:
    # Where the CPU quantises, its temporary memory lies between the packed weights, and glibc would keep all of it
    # once it is freed: three times the packed model.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def stored_tensors(
    folder: Path, device: torch.device, *, not_finite: set[str], in_pages: bool = False
) -> dict[str, StoredTensor]:
    """Every tensor of the model in a folder, by name; no data is read.

    Args:
        folder: with `model.safetensors`, or several files and their index.
        device: where they will go.
        not_finite: gets the name of each tensor that is read and holds a value that is NaN or infinite.
        in_pages: whether those on the host are left in their file's own pages, which all processes have in common.

    Raises:
        SafetensorError: a file is damaged.
        OSError: one is missing.
    """
    names = [_SINGLE]
    if not (folder / _SINGLE).is_file():
        names = sorted({*json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()})
    tensors = {}
    for path in (folder / name for name in names):
        with safe_open(path, framework="pt") as file:
            mapped = safe_open(path, framework="pt") if in_pages else None
            for name in file.keys():  # noqa: SIM118 - no dict
                tensor = file.get_slice(name)
                tensors[name] = StoredTensor(
                    file=path,
                    name=name,
                    header=TensorHeader(dtype=tensor.get_dtype(), shape=tuple(tensor.get_shape())),
                    on_cpu=device.type == "cpu" and not in_pages,
                    mapped=mapped,
                    not_finite=not_finite,
                )
    return tensors


def stored_names(folder: Path) -> list[str]:
    """Every tensor's name, as far as it is known before there are weights: by the index, or in the one file.

    What is wrong with those files is said where tensors are read; here there are no names then.
    """
    try:
        if (folder / _SINGLE).is_file():
            with safe_open(folder / _SINGLE, framework="pt") as file:
                return [*file.keys()]
        return [*json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return []


def tensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of what the files of `sharded` hold, but for their headers."""
    return sum(tensor.nbytes for tensor in tensors.values())


def sharded(tensors: Mapping[str, Tensor], *, most_bytes: int = _SHARD_BYTES) -> Files:
    """The files that `stored_tensors` reads these tensors from.

    Args:
        tensors: on any device; none of them twice.
        most_bytes: of a file; one that holds a single tensor may be larger.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and tensors_bytes(shards[-1]) + tensor.nbytes > most_bytes:
            shards.append({})
        shards[-1][name] = tensor
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}.safetensors"
        places |= dict.fromkeys(shard, file)
        yield file, partial(content_of, shard)
    yield index_of(places)


def index_of(places: Mapping[str, str]) -> tuple[str, Callable[[], bytes]]:
    """The file that says of each tensor in which file it is."""
    return _INDEX, json.dumps({"weight_map": dict(places)}, indent=2).encode


def content_of(shard: Mapping[str, Tensor]) -> bytes:
    """A file's content: these tensors, from whatever device."""
    content: bytes = save({name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()})
    return content
