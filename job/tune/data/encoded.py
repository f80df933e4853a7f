"""Examples -> token ids with target spans in Arrow files, written once and read memory-mapped."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from job.core.errors import StopRequestedError
from job.core.lengths import Lengths
from job.core.records import Example
from job.tune.data.frame import Framed, TokenRules, encode_examples

Side = Literal["train", "validation"]
_SIDES: tuple[Side, ...] = ("train", "validation")
_BATCH = 1000
"""Examples handed to the tokenizer at once, ..."""
_BATCH_CHARACTERS = 2**20
"""... and characters, unless one has more by itself: while it is encoded a token takes hundreds of bytes."""
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "target_spans": pa.list_(pa.int32()),
        "answer_from": pa.int32(),
        "digest": pa.binary(),
        "where": pa.string(),
    }
)
FORMAT = 3
"""What `encode` writes: files of another format are encoded anew."""


class EncodedSet:
    """One side of the dataset on disk, memory-mapped."""

    lengths: Lengths
    """[examples], not truncated."""
    answer_from: NDArray[np.int32]
    """[examples]: position where the last learned part of each begins."""

    def __init__(self, path: Path) -> None:
        self._table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.lengths = _numpy(pc.list_value_length(self._table.column("input_ids"))).astype(np.int32)
        self.answer_from = _numpy(self._table.column("answer_from"))

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
        column = self._table.column("target_spans")
        spans = np.minimum(_numpy(pc.list_flatten(column)).reshape(-1, 2), max_length)
        targets_before = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0], dtype=np.int64)])
        spans_before = np.concatenate([[0], np.cumsum(_numpy(pc.list_value_length(column)) // 2)])
        counts: NDArray[np.int64] = np.diff(targets_before[spans_before])
        return counts

    def largest_id(self) -> tuple[int, int] | None:
        """The largest token id, and the first example that has it; None: there is no token."""
        ids = pc.list_flatten(self._table.column("input_ids"))
        if not len(ids):
            return None
        largest = pc.max(ids)
        example = np.searchsorted(np.cumsum(self.lengths, dtype=np.int64), pc.index(ids, largest).as_py(), side="right")
        return largest.as_py(), int(example)

    def where(self, index: int) -> str:
        """`file:line` of one example."""
        return str(self._table.column("where")[index].as_py())

    def digests(self) -> list[bytes]:
        """The content names of all examples."""
        values: list[bytes] = self._table.column("digest").to_pylist()
        return values


def _numpy(column: Any) -> Any:
    return column.to_numpy() if len(column) else np.zeros(0, dtype=np.int32)


def encode(
    examples: Iterable[tuple[Side, Example]],
    tokenizer: Any,
    rules: TokenRules,
    *,
    folder: Path,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
) -> dict[Side, EncodedSet]:
    """Write both sides to Arrow files that appear whole.

    Args:
        examples: each with its side; read once.
        tokenizer: the base model's.
        rules: from `token_rules`.
        folder: where the files stand; it belongs to one run, so its files can only hold this run's data.
        should_stop: polled between batches.
        on_progress: called with the number of encoded examples.

    Raises:
        StopRequestedError: asked to stop; the next attempt writes over what is there so far.
    """
    partial = {side: folder / f"{side}.partial" for side in _SIDES}
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    with ExitStack() as files:
        writers = {side: files.enter_context(pa.ipc.new_stream(str(partial[side]), _SCHEMA)) for side in _SIDES}
        for batch in _batches(examples):
            if should_stop():
                raise StopRequestedError("asked to stop while encoding")
            framed = encode_examples([example for _, example in batch], tokenizer, rules)
            rows: dict[Side, list[dict[str, Any]]] = {side: [] for side in _SIDES}
            for (side, example), each in zip(batch, framed, strict=True):
                rows[side].append(_row(example, each))
            for side, writer in writers.items():
                # At once: a writer that keeps them, keeps as many as there are, whatever their length.
                writer.write_batch(pa.RecordBatch.from_pylist(rows[side], schema=_SCHEMA))
            done += len(batch)
            on_progress(done)
    for side in _SIDES:
        partial[side].replace(_path(folder, side))
    return open_encoded(folder)


def open_encoded(folder: Path) -> dict[Side, EncodedSet]:
    """Both sides as `encode` left them."""
    return {side: EncodedSet(_path(folder, side)) for side in _SIDES}


def _row(example: Example, framed: Framed) -> dict[str, Any]:
    return {
        "input_ids": framed.ids,
        "target_spans": list(chain.from_iterable(framed.spans)),  # start, end, start, end, ...
        "answer_from": framed.answer_from,
        "digest": example.digest,
        "where": example.where,
    }


def _path(folder: Path, side: Side) -> Path:
    return folder / f"{side}.arrow"


def _batches(examples: Iterable[tuple[Side, Example]]) -> Iterator[list[tuple[Side, Example]]]:
    batch: list[tuple[Side, Example]] = []
    characters = 0
    for side, example in examples:
        size = sum(len(part.text) for part in example.parts)
        if batch and (len(batch) == _BATCH or characters + size > _BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append((side, example))
        characters += size
    if batch:
        yield batch
