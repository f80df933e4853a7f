"""Encoded examples -> the documents that are trained or judged on: selected, and cut at max_length."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from job.core.data.lengths import Lengths
from job.core.errors import DataError
from job.tune.data.encoded import EncodedSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """The examples of one side as they are trained or judged on: selected, and cut at max_length."""

    encoded: EncodedSet
    rows: NDArray[np.int64]
    max_length: int
    dropped_rows: NDArray[np.int64]
    """Longer than max_length, and left out."""
    rows_without_target: NDArray[np.int64]
    """Nothing to learn from after the cut, and left out."""
    lengths: Lengths
    """Tokens of each document after the cut."""
    targets: NDArray[np.int64]
    """Target tokens of each document after the cut."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def truncated(self) -> int:
        """Documents that were cut at max_length."""
        return int((self.encoded.lengths[self.rows] > self.max_length).sum())

    @property
    def dropped(self) -> int:
        """Examples that are longer than max_length, and left out."""
        return len(self.dropped_rows)

    @property
    def without_target(self) -> int:
        """Examples with nothing to learn from after the cut, and left out."""
        return len(self.rows_without_target)

    @property
    def sources(self) -> NDArray[np.int32]:
        """Place of each document's source; ascending, since a side is encoded source after source."""
        return self.encoded.sources[self.rows]

    def token_ids(self, document: int) -> NDArray[np.int32]:
        """Token ids of one document after the cut."""
        return self.encoded.input_ids(int(self.rows[document]))[: self.max_length]

    def spans(self, document: int) -> NDArray[np.int32]:
        """[spans, 2]: target spans of one document after the cut; half-open, ascending, none empty."""
        spans = self.encoded.spans(int(self.rows[document]))
        return np.minimum(spans[spans[:, 0] < self.max_length], self.max_length)

    def answer_from(self, document: int) -> int:
        """Position where the last learned part of one document begins."""
        return int(self.encoded.answer_from[self.rows[document]])

    def is_whole(self, document: int) -> bool:
        """Whether one document was not cut."""
        return bool(self.encoded.lengths[self.rows[document]] <= self.max_length)

    def ends(self, most: int = 1000) -> set[int]:
        """The tokens that the first documents which were not cut learn to end with."""
        found = set()
        for row in self.rows[:most]:
            ids, spans = self.encoded.input_ids(int(row)), self.encoded.spans(int(row))
            if len(ids) <= self.max_length:
                found.add(int(ids[spans[-1, 1] - 1]))  # a chat template may write a line break behind it
        return found

    def kept(self, document: int, place: int) -> str | None:
        """A field of one document's record that was kept, by its place among them; None: it is not there."""
        return self.encoded.kept(int(self.rows[document]))[place]

    def names(self) -> list[str]:
        """What names the content of each document, wherever it stands."""
        return [f"{high:016x}{low:016x}" for high, low in self.encoded.digests()[self.rows].tolist()]

    def where(self, document: int) -> str:
        """`file:line` of one document."""
        return self.encoded.where(int(self.rows[document]))


def select_documents(
    encoded: EncodedSet, *, max_length: int, too_long: Literal["truncate", "drop", "fail"], most: int | None = None
) -> Documents:
    """Apply max_length, leave out what has no target, and keep at most `most` by a hash of the content.

    Raises:
        DataError: an example is too long, and the recipe says `too_long: fail`; or none is left.
    """
    over = encoded.lengths > max_length
    if too_long == "fail" and over.any():
        first = int(np.argmax(over))
        raise DataError(
            f"{encoded.where(first)}: {int(encoded.lengths[first])} tokens, more than max_length {max_length} "
            f"({int(over.sum())} such examples); raise data.max_length, or set data.too_long: truncate or drop"
        )
    kept = ~over if too_long == "drop" else np.ones(len(encoded), dtype=bool)
    targets = encoded.target_counts(max_length)
    has_target = targets > 0
    rows = np.flatnonzero(kept & has_target)
    if most is not None and most < len(rows):
        digests = encoded.digests()[rows]
        rows = np.sort(rows[np.lexsort((digests[:, 1], digests[:, 0]))[:most]])
    return Documents(
        encoded=encoded,
        rows=rows,
        max_length=max_length,
        dropped_rows=np.flatnonzero(~kept),
        rows_without_target=np.flatnonzero(kept & ~has_target),
        lengths=np.minimum(encoded.lengths[rows], max_length),
        targets=targets[rows],
    )
