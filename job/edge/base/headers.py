"""The headers of a base's safetensors files: which tensors they hold, read without the tensors, wherever they stand."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from job.core.base.promises import TensorHeader
from job.core.errors import DataError, UnavailableError

ReadPart = Callable[[str, int, int], bytes]
"""Name of a file, first byte and number of bytes -> its content there."""
_LONGEST_BYTES = 2**24
"""A tensor takes a hundred bytes of it; the format itself would allow six times as many."""
_FIRST_BYTES = 2**17
"""Read at once: nearly every header is shorter, and then one request is enough."""
_WORKERS = 8
_READINGS = 6
"""Of the same piece, at most."""


def read_headers(files: Mapping[str, int], read_part: ReadPart, *, source: str) -> dict[str, TensorHeader]:
    """Every tensor of these files, by name.

    Args:
        files: name -> bytes.
        read_part: reads a piece of one; called on several threads.
        source: what the recipe calls the model.

    Raises:
        DataError: a file is no safetensors file, or two hold the same tensor.
        UnavailableError: what is read is something else each time.
        JobError: as `read_part`.
    """
    read_part = _confirmed(read_part, source=source)
    with ThreadPoolExecutor(_WORKERS) as pool:
        each = pool.map(lambda name: _header(name, files[name], read_part, source=source), files)
        found: dict[str, TensorHeader] = {}
        for name, tensors in zip(files, each, strict=True):
            twice = found.keys() & tensors.keys()
            if twice:
                raise DataError(f"{source}: {name}: {min(twice)} stands in another file as well; copy the model again")
            found |= tensors
    return found


def _confirmed(read_part: ReadPart, *, source: str) -> ReadPart:
    # A piece of a file comes without the file's checksum, and who is refused for what it says is not tried again.
    def read(name: str, start: int, length: int) -> bytes:
        seen: list[bytes] = []
        while len(seen) < _READINGS:
            piece = read_part(name, start, length)
            if piece in seen:
                return piece
            seen.append(piece)
        raise UnavailableError(
            f"{source}: {name}: {length:,} bytes at {start:,} came differently each of {_READINGS} times: they are "
            "damaged on their way; look at the network and at the store"
        )

    return read


def _header(name: str, size: int, read_part: ReadPart, *, source: str) -> dict[str, TensorHeader]:
    if size < 8:  # noqa: PLR2004 the length field
        raise DataError(f"{source}: {name}: no safetensors header; copy the model again")
    first = read_part(name, 0, min(size, _FIRST_BYTES))
    length = int.from_bytes(first[:8], "little")
    if not 2 <= length <= min(_LONGEST_BYTES, size - 8):  # noqa: PLR2004 `{}`
        raise DataError(f"{source}: {name}: no safetensors header; copy the model again")
    text = first[8 : 8 + length]
    if len(text) < length:
        text += read_part(name, 8 + len(text), length - len(text))
    try:
        header = json.loads(text)
        return {
            tensor: TensorHeader(dtype=str(entry["dtype"]), shape=tuple(int(side) for side in entry["shape"]))
            for tensor, entry in header.items()
            if tensor != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{source}: {name}: nonsense in the safetensors header ({type(error).__name__}); copy the model again"
        ) from error
