"""Encoded examples on disk: rows as an Arrow stream, and one side of the dataset read from it memory-mapped."""

import mmap
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from job.core.data.lengths import Lengths
from job.core.data.records import Example
from job.core.data.same_content import Digests, is_in_part
from job.tune.data.frame import Framed

DIGEST_BYTES = 16
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "target_spans": pa.list_(pa.int32()),
        "answer_from": pa.int32(),
        "digest": pa.binary(DIGEST_BYTES),
        "where": pa.string(),
        "source": pa.int32(),
        "kept": pa.list_(pa.string()),
    }
)
FORMAT = 6
"""What is written: files of another format are encoded anew."""
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def rows_of(
    examples: Sequence[Example],
    framed: Sequence[Framed],
    *,
    source: int,
    kept: Sequence[Sequence[str | None]] | None = None,
) -> bytes:
    """Encoded examples of one source as a part of a stream, whichever process makes it; see `stream_start`.

    Args:
        examples: as they were read.
        framed: their ids.
        source: their place.
        kept: fields of each one's record that are kept beside its text; None: there are none.
    """
    columns = [
        _lists([each.ids for each in framed]),
        _lists([list(chain.from_iterable(each.spans)) for each in framed]),  # start, end, start, end, ...
        pa.array([each.answer_from for each in framed], pa.int32()),
        pa.array([example.digest for example in examples], pa.binary(DIGEST_BYTES)),
        pa.array([example.where for example in examples], pa.string()),
        pa.array([source] * len(examples), pa.int32()),
        pa.array(kept if kept is not None else [None] * len(examples), pa.list_(pa.string())),
    ]
    written: bytes = pa.record_batch(columns, schema=_SCHEMA).serialize().to_pybytes()
    return written


def _lists(rows: Sequence[Sequence[int]]) -> pa.Array:
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, np.fromiter(chain.from_iterable(rows), np.int32, count=int(ends[-1])))


def stream_start() -> bytes:
    """What a file begins with; parts of `rows_of` follow in their order, and STREAM_END."""
    written: bytes = _SCHEMA.serialize().to_pybytes()
    return written


class EncodedSet:
    """One side of the dataset on disk, memory-mapped."""

    lengths: Lengths
    """[examples], not truncated."""
    answer_from: NDArray[np.int32]
    """[examples]: position where the last learned part of each begins."""
    sources: NDArray[np.int32]
    """[examples]: place of each one's source, ascending."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._table = pa.ipc.open_stream(pa.py_buffer(self._mapped)).read_all()
        self.lengths = _joined([pc.list_value_length(part).to_numpy() for part in self._parts("input_ids")], np.int32)
        self.answer_from = _joined([part.to_numpy().copy() for part in self._parts("answer_from")], np.int32)
        self.sources = _joined([part.to_numpy().copy() for part in self._parts("source")], np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def input_ids(self, index: int) -> NDArray[np.int32]:
        """Token ids of one example, framed, not truncated."""
        values: NDArray[np.int32] = self._table.column("input_ids")[index].values.to_numpy()
        return values

    def spans(self, index: int) -> NDArray[np.int32]:
        """[spans, 2]: target spans of one example, not truncated; see `Framed`."""
        values: NDArray[np.int32] = self._table.column("target_spans")[index].values.to_numpy()
        return values.reshape(-1, 2)

    def target_counts(self, max_length: int) -> NDArray[np.int64]:
        """[examples]: targets among the first `max_length` tokens of each."""
        return _joined([_target_counts(part, max_length) for part in self._parts("target_spans")], np.int64)

    def largest_id(self) -> tuple[int, int] | None:
        """The largest token id, and the first example that has it; None: there is no token."""
        found, before = None, 0
        for part in self._parts("input_ids"):
            ids = part.flatten()
            largest = pc.max(ids).as_py()
            if largest is not None and (found is None or largest > found[0]):
                ends = part.offsets.to_numpy()[1:] - part.offsets[0].as_py()
                found = largest, before + int(np.searchsorted(ends, pc.index(ids, largest).as_py(), side="right"))
            before += len(part)
        return found

    def where(self, index: int) -> str:
        """`file:line` of one example."""
        return str(self._table.column("where")[index].as_py())

    def kept(self, index: int) -> Sequence[str | None]:
        """Fields of one example's record that were kept beside its text; empty: none was asked for."""
        return self._table.column("kept")[index].as_py() or ()

    def digests(self) -> Digests:
        """[examples, 2]: the content names of all examples, in the order of their bytes."""
        parts = [_digests(part) for part in self._parts("digest")]
        return np.concatenate([np.zeros((0, 2), dtype=np.uint64), *parts])

    def part(self, number: int, of: int) -> tuple[NDArray[np.int64], Digests]:
        """Rows of the examples whose digests are in one of so many parts, and these: see `is_in_part`."""
        rows, digests = [np.zeros(0, dtype=np.int64)], [np.zeros((0, 2), dtype=np.uint64)]
        before = 0
        for column in self._parts("digest"):
            every = _digests(column)
            inside = np.flatnonzero(is_in_part(every, number, of))
            rows.append(inside + before)
            digests.append(every[inside])
            before += len(every)
        return np.concatenate(rows), np.concatenate(digests)

    def _parts(self, column: str) -> Iterator[Any]:
        """A whole column, part by part; of what was read no page stays in this process: it is as large as the data."""
        for part in self._table.column(column).chunks:
            yield part
            self._mapped.madvise(mmap.MADV_DONTNEED)


def _target_counts(spans: pa.ListArray, max_length: int) -> NDArray[np.int64]:
    ends = np.minimum(spans.flatten().to_numpy().reshape(-1, 2), max_length)
    targets_before = np.concatenate([[0], np.cumsum(ends[:, 1] - ends[:, 0], dtype=np.int64)])
    offsets = spans.offsets.to_numpy() // 2
    counts: NDArray[np.int64] = np.diff(targets_before[offsets - offsets[0]])
    return counts


def _digests(column: pa.FixedSizeBinaryArray) -> Digests:
    found = np.frombuffer(column.buffers()[1], dtype=">u8", count=2 * len(column), offset=column.offset * DIGEST_BYTES)
    return found.reshape(-1, 2).astype(np.uint64)


def _joined(parts: Sequence[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
    """A copy, as one array; a part may lie in the file."""
    return np.concatenate([np.zeros(0, dtype=kind), *parts]).astype(kind, copy=False)
