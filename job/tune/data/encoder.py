"""One chunk of lines -> rows of both sides, and what was seen on the way; the same in whichever process."""

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from job.core.chunks import Chunk, Side
from job.core.data_section import DataSection, Fraction
from job.core.records import Example, Tally, checked_lines, is_held_out
from job.tune.data.encoded import rows_of
from job.tune.data.frame import TokenRules, encode_examples

_AT_ONCE_CHARACTERS = 2**18
"""Handed to the tokenizer, unless one example has more by itself: while it is encoded a token takes hundreds of
bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedChunk:
    """What came of one chunk."""

    side: Side
    """That its files belong to."""
    tally: Tally
    rows: dict[Side, bytes] = field(default_factory=dict)
    """Of the sides that have some."""
    examples: int = 0
    bytes: int = 0
    """Of its lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Makes rows of chunks; it can be sent to another process."""

    rules: TokenRules
    data: DataSection

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """Check, render and encode the lines of a chunk.

        Raises:
            DataError: the tokenizer gives up.
        """
        tally = Tally()
        sides: dict[Side, list[Example]] = {}
        for example in checked_lines(chunk.numbered(), self.data, tally=tally):
            sides.setdefault(self._side(chunk, example), []).append(example)
        return EncodedChunk(
            side=chunk.side,
            tally=tally,
            rows={side: self.rows(examples) for side, examples in sides.items()},
            examples=tally.good,
            bytes=chunk.size,
        )

    def rows(self, examples: Sequence[Example]) -> bytes:
        """Examples as a part of a file."""
        framed = [each for few in _few(examples) for each in encode_examples(few, self.rules)]
        return rows_of(examples, framed)

    def _side(self, chunk: Chunk, example: Example) -> Side:
        held_out = self.data.validation
        if chunk.side == "train" and isinstance(held_out, Fraction) and is_held_out(example.digest, held_out.fraction):
            return "validation"
        return chunk.side

    def fingerprint(self) -> str:
        """Names all that decides what the token ids of a text are: the tokenizer, how it is used, and its library."""
        return hashlib.sha256(version("tokenizers").encode() + b"\0" + pickle.dumps(self.rules)).hexdigest()


def _few(examples: Sequence[Example]) -> Iterator[list[Example]]:
    few: list[Example] = []
    characters = 0
    for example in examples:
        size = sum(len(part.text) for part in example.parts)
        if few and characters + size > _AT_ONCE_CHARACTERS:
            yield few
            few, characters = [], 0
        few.append(example)
        characters += size
    if few:
        yield few
