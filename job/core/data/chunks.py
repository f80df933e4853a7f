"""Lines in chunks: what one process takes at once to make examples of, the same however many processes there are."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Side = Literal["train", "validation"]
CHUNK_BYTES = 2**19
"""Of lines, at most, unless one is longer by itself; ..."""
CHUNK_LINES = 1000
"""... and lines. A token takes hundreds of bytes while it is encoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Lines of one file, one after the other."""

    file: str
    """What messages call it."""
    first: int
    """Number of the first one in the file, from 1."""
    lines: tuple[bytes, ...]
    """Without their ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Lines of one source, of one file or of several in a row."""

    side: Side
    """Which side of the dataset the files belong to."""
    source: int
    """Which of the side's sources the files belong to, from 0."""
    pieces: tuple[Lines, ...]

    @property
    def size(self) -> int:
        """Bytes of all lines."""
        return sum(len(line) for piece in self.pieces for line in piece.lines)

    def numbered(self) -> Iterator[tuple[str, int, bytes]]:
        """File, line number and bytes of each line."""
        for piece in self.pieces:
            for number, line in enumerate(piece.lines, start=piece.first):
                yield piece.file, number, line


def in_chunks(lines: Iterable[tuple[str, int, bytes]], *, side: Side, source: int = 0) -> Iterator[Chunk]:
    """Lines of one source -> chunks; a chunk begins where the one before has no room left.

    Args:
        lines: file, line number and bytes of each.
        side: of the files.
        source: of the files.
    """
    taken: list[tuple[str, int, bytes]] = []
    size = 0
    for each in lines:
        if taken and (size + len(each[2]) > CHUNK_BYTES or len(taken) == CHUNK_LINES):
            yield _chunk(taken, side, source)
            taken, size = [], 0
        taken.append(each)
        size += len(each[2])
    if taken:
        yield _chunk(taken, side, source)


def _chunk(taken: list[tuple[str, int, bytes]], side: Side, source: int) -> Chunk:
    # Two files in a row may have one name; then the numbers begin anew, and with them another piece.
    runs = groupby(enumerate(taken), key=lambda each: (each[1][0], each[1][1] - each[0]))
    pieces = [(name, [line for _, line in run]) for (name, _offset), run in runs]
    return Chunk(
        side=side,
        source=source,
        pieces=tuple(Lines(file=name, first=run[0][1], lines=tuple(line for *_, line in run)) for name, run in pieces),
    )
