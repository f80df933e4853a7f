"""The files of a merged model, of the base's own cut, each written as its tensors come: one of them is in memory."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from job.core.base.promises import STATE, TensorHeader
from job.core.errors import DataError
from job.tune.merging.factors import AdapterFile, Factors
from job.tune.merging.origins import STACK, STATES, Origins, Part
from job.tune.model.four_bit import dequantised_in_files, shape_in_files
from job.tune.model.stored.mxfp4 import Stored

Pieces = Iterator[memoryview]
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_ALIGNED = 8
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Untied:
    """Embeddings and head that were one tensor, of which one was adapted: they are two from then on."""

    embeddings: str
    """The parameters' names in the decoder's own class."""
    head: str
    in_files: str
    """What the head is called in the merged files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merger:
    """What is done to the parameters of a base."""

    origins: Origins
    adapter: AdapterFile
    inside: Callable[[str], str]
    """A parameter's name in the adapter's model -> in the decoder's own class."""
    through: Mapping[str, Callable[[Tensor], Tensor]]
    """Parameters that go through 4 bits before the adapter is added, as they did in training -> a matrix's way there
    and back; of experts each one's."""
    untied: "Untied | None"
    """None: head and embeddings stay what they are, one tensor or two."""


class MergedWeights:
    """The weights of a merged model, as files of the base's own cut."""

    def __init__(self, merger: Merger, tensors: Mapping[str, Stored]) -> None:
        """No data is read, but for what describes weights in 4 bits.

        Args:
            merger: what is done.
            tensors: all of the base's files, by the names in them.

        Raises:
            DataError: the adapter adds to a weight that the files do not have, or a state in 4 bits cannot be read.
        """
        work = _Work(merger, tensors)
        self._files: dict[str, list[_Entry]] = {}
        for tensor in tensors.values():
            self._files.setdefault(tensor.file.name, []).extend(work.entries(tensor))
        entries = [entry for each in self._files.values() for entry in each]
        self.bytes = sum(entry.header.bytes for entry in entries)
        self.dtype = _commonest([entry.header for entry in entries])
        """Of most of them, as the format writes it."""

    def files(self) -> Iterator[tuple[str, Callable[[], Pieces]]]:
        """Name of each file, and what makes its content, piece by piece; the index comes last.

        Making it raises DataError: weights are not finite, or cannot be read.
        """
        for name, entries in self._files.items():
            yield name, partial(_content, entries)
        if [*self._files] != [_SINGLE]:
            places = {entry.name: name for name, entries in self._files.items() for entry in entries}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(places.items()))}
            yield _INDEX, partial(iter, [memoryview(json.dumps(index, indent=2).encode() + b"\n")])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A tensor of the merged files."""

    name: str
    header: TensorHeader
    make: Callable[[], Tensor]


class _Work:
    """Makes the tensors; the last part of a group is kept, as its pieces follow each other in the files."""

    def __init__(self, merger: Merger, tensors: Mapping[str, Stored]) -> None:
        self._merger, self._origins, self._tensors = merger, merger.origins, tensors
        self._added = {merger.inside(name): name for name in merger.adapter.parameters()}
        # Those of a layer's experts are read once, not for each of them: the files have its two matrices by turns.
        self._read_factors = lru_cache(maxsize=2)(merger.adapter.factors)
        self._changing = {*self._added, *merger.through}
        self._untied = merger.untied
        new = None if self._untied is None else self._untied.head
        missing = [name for name in self._added if name not in self._origins and name != new]
        if missing:
            raise DataError(f"{missing[0]}: the adapter adds to it, and the base's files have no such weight")
        self._of_file = {self._origins.stored(name).name: name for name in self._origins.names()}
        self._packed = {name.partition(STATE)[0]: name for name in tensors if STATE in name}
        self._states = {name + state for name in self._packed for state in STATES} | {*self._packed.values()}
        self._plain_dtype = _commonest([tensor.header for tensor in tensors.values()])
        self._last: tuple[Part, dict[str, list[Tensor]]] | None = None

    def entries(self, tensor: Stored) -> Iterator[_Entry]:
        """What becomes of a tensor of the base's files: nothing of what stands beside a weight in 4 bits."""
        if tensor.name in self._states:
            return
        name, untied, header = self._of_file.get(tensor.name), self._untied, self._header(tensor)
        if name is None:
            yield _Entry(name=tensor.name, header=header, make=lambda: self._beside(tensor))
            return
        if untied is not None and name == untied.head:
            return  # it comes beside the embeddings
        yield _Entry(name=tensor.name, header=header, make=lambda: self._checked(name, self._value(name)))
        if untied is not None and name == untied.embeddings:
            head = untied.in_files
            yield _Entry(name=head, header=header, make=lambda: self._checked(head, self._head(untied)))

    def _header(self, tensor: Stored) -> TensorHeader:
        state = self._packed.get(tensor.name)
        if state is None:
            return tensor.header
        return TensorHeader(dtype=self._plain_dtype, shape=shape_in_files(self._tensors[state][...], name=tensor.name))

    def _beside(self, tensor: Stored) -> Tensor:
        """A tensor that is none of the decoder's."""
        value: Tensor = tensor[...]
        if tensor.name not in self._packed:
            return value
        state = {name: self._tensors[name][...] for name in self._tensors if name.startswith(f"{tensor.name}.")}
        return dequantised_in_files(value, state, name=tensor.name).to(_DTYPES[self._plain_dtype])

    def _dtype(self, name: str) -> torch.dtype | None:
        return _DTYPES.get(self._header(self._origins.stored(name)).dtype)

    def _head(self, untied: Untied) -> Tensor:
        """The head that was the embeddings, as it was trained."""
        dtype = self._dtype(untied.embeddings)
        value = self._origins.read(untied.embeddings)
        factors = self._factors(untied.head)
        return value if factors is None or dtype is None else factors.added_to(value, dtype)

    def _value(self, name: str) -> Tensor:
        group, dtype = self._origins.group_of(name), self._dtype(name)
        if group is None or dtype is None or self._changing.isdisjoint(group.made):
            value = self._origins.read(name)
            return value if dtype is None else value.to(dtype)
        shape = self._origins.stored(name).header.shape
        if group.converter is None:
            return self._as_it_stands(name, group.target, shape, dtype)
        result = torch.empty(shape, dtype=dtype)
        for part in self._origins.parts(group):
            for pattern, names in part.pieces.items():
                if name in names:
                    piece = self._pieces(part, dtype)[pattern][[*names].index(name)]
                    if part.expert is not None and piece.ndim == len(shape) == STACK:
                        result[part.expert] = piece[0]
                    else:
                        result = piece
        return result

    def _as_it_stands(self, name: str, parameter: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of the files that is the parameter; of all experts', one after the other."""
        if len(shape) < STACK:
            return self._changed(parameter, self._origins.read(name), None, dtype)
        result = torch.empty(shape, dtype=dtype)
        for expert in range(shape[0]):
            result[expert] = self._changed(parameter, self._origins.share(name, expert), expert, dtype)[0]
        return result

    def _changed(self, parameter: str, value: Tensor, expert: int | None, dtype: torch.dtype) -> Tensor:
        """A parameter as it is computed with, and the adapter added; `expert`: whose it is, as a stack of one."""
        through = self._merger.through.get(parameter)
        if through is not None:
            value = torch.stack([*map(through, value)]) if value.ndim == STACK else through(value)
        factors = self._factors(parameter)
        if factors is None:
            return value.to(dtype)
        if expert is None:
            return factors.added_to(value, dtype)
        return factors.of(expert).added_to(value[0], dtype)[None]

    def _factors(self, parameter: str) -> Factors | None:
        name = self._added.get(parameter)
        return None if name is None else self._read_factors(name)

    def _pieces(self, part: Part, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        """What a part's pieces in the files become: the way that its numbers take is found by sending places along."""
        if self._last is not None and self._last[0] == part:
            return self._last[1]
        self._last = None
        values = self._origins.values(part)
        places, count = _places(values)
        whence = self._origins.converted(part, places)
        result = torch.empty(count, dtype=dtype)
        seen = torch.zeros(count, dtype=torch.bool)
        for parameter, value in self._origins.converted(part, values).items():
            to = whence[parameter].reshape(-1).long()
            result[to] = self._changed(parameter, value, part.expert, dtype).reshape(-1)
            seen[to] = True
        if not bool(seen.all()):
            raise DataError(f"{part.group.target}: what the base's files hold of it cannot be followed to the model")
        found = _cut(result, values)
        self._last = part, found
        return found

    def _checked(self, name: str, value: Tensor) -> Tensor:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DataError(
                f"{name}: not every number is finite once the adapter is added and the sum is in {value.dtype}; "
                "serve the adapter beside its base"
            )
        return value


def _places(values: Mapping[str, list[Tensor]]) -> tuple[dict[str, list[Tensor]], int]:
    """In place of each number its own place in all of them."""
    found: dict[str, list[Tensor]] = {}
    start = 0
    for pattern, tensors in values.items():
        found[pattern] = []
        for tensor in tensors:
            stop = start + tensor.numel()
            dtype = torch.int32 if stop < 2**31 else torch.int64
            found[pattern].append(torch.arange(start, stop, dtype=dtype).reshape(tensor.shape))
            start = stop
    return found, start


def _cut(result: Tensor, values: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    sizes = [tensor.numel() for tensors in values.values() for tensor in tensors]
    pieces = iter(torch.split(result, sizes))
    return {pattern: [next(pieces).reshape(tensor.shape) for tensor in tensors] for pattern, tensors in values.items()}


def _commonest(headers: list[TensorHeader]) -> str:
    """The dtype of what is not in 4 bits, by bytes."""
    sizes = dict.fromkeys(_DTYPES, 0)
    for header in headers:
        if header.dtype in sizes:
            sizes[header.dtype] += header.bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _content(entries: list[_Entry]) -> Pieces:
    """A safetensors file: the length of its header, the header, and the tensors one after the other."""
    ordered = sorted(entries, key=lambda entry: (-_item_bytes(entry.header), entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for entry in ordered:
        end = place + entry.header.bytes
        header[entry.name] = {
            "dtype": entry.header.dtype,
            "shape": entry.header.shape,
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for entry in ordered:
        value = entry.make()
        assert value.nbytes == entry.header.bytes, f"{entry.name}: {value.nbytes} bytes of {entry.header}"
        if value.nbytes:
            yield value.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _item_bytes(header: TensorHeader) -> int:
    return TensorHeader(dtype=header.dtype, shape=()).bytes


def merged_config(content: Mapping[str, Any], *, untied: bool, dtype: str | None) -> dict[str, Any]:
    """config.json of the merged model.

    Args:
        content: the base's.
        untied: whether head and embeddings were one tensor, and are two now.
        dtype: of the weights, where the base's were in 4 bits.
    """
    left_out = {"quantization_config", "_name_or_path"} | ({"torch_dtype", "dtype"} if dtype else set())
    config = {key: value for key, value in content.items() if key not in left_out}
    if dtype is not None:
        config["dtype"] = dtype
    if untied:
        config["tie_word_embeddings"] = False
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = text | {"tie_word_embeddings": False}
    return config
