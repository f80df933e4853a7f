"""One chunk of lines -> rows of both sides, and what was seen on the way; the same in whichever process."""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, Self

from job.core.data.chunks import Chunk, Side
from job.core.data.fields import value_of
from job.core.data.records import BOM, Example, Tally, checked_lines, is_held_out
from job.core.recipe.data_section import DataSection, DataSource, Fraction
from job.tune.data.chats.chat import ChatRules, ChatTemplates, chat_rules
from job.tune.data.encoded import rows_of
from job.tune.data.frame import TokenRules, encode_examples, token_rules

_AT_ONCE_CHARACTERS = 2**18
"""Handed to the tokenizer, unless one example has more by itself: while it is encoded a token takes hundreds of
bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedChunk:
    """What came of one chunk."""

    side: Side
    """That its files belong to."""
    source: int
    """Of that side."""
    tally: Tally
    rows: dict[Side, bytes] = field(default_factory=dict)
    """Of the sides that have some."""
    examples: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRules:
    """How the records of one source become token ids."""

    data: DataSection
    """With the source's own templates, if it has any."""
    tokens: TokenRules
    chat: ChatRules | None
    """Of a source of conversations."""
    kept: tuple[str, ...] = ()
    """Fields of held-out records that are kept beside their text."""


Rules = Mapping[Side, Sequence[SourceRules]]
"""Of the sources that have files of their own."""


def rules_of(tokenizer: Any, data: DataSection, *, kept: tuple[str, ...] = ()) -> Rules:
    """What decides how each source is encoded.

    Args:
        tokenizer: the base model's.
        data: the recipe's section.
        kept: fields of held-out records that evaluations need.

    Raises:
        UsageError: as `token_rules`; or there are chats, and no chat template.
    """
    tokens = token_rules(tokenizer, data)

    def of(source: DataSource) -> SourceRules:
        own = source.data
        return SourceRules(
            data=own,
            tokens=replace(tokens, loss_on_prompt=own.loss_on == "all"),
            chat=None if own.chat is None else chat_rules(tokenizer, own),
            kept=kept,
        )

    return {"train": tuple(map(of, data.sources)), "validation": tuple(map(of, data.held_out_sources))}


class Encoder:
    """Makes rows of chunks; it can be sent to another process, and begins there what it needs."""

    def __init__(self, rules: Rules, *, should_stop: Callable[[], bool] = lambda: False) -> None:
        """With the rules of each source; `should_stop` is polled while chats are rendered, in this process only."""
        self._rules = rules
        self._chats = ChatTemplates(should_stop=should_stop)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what is at work here. A process that it is sent to is ended as a whole."""
        return (Encoder, (self._rules,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._chats.close()

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """Check, render and encode the lines of a chunk.

        Raises:
            DataError: the tokenizer gives up, or a chat template cannot be used.
        """
        own, tally = self._rules[chunk.side][chunk.source], Tally()
        render = None if own.chat is None else self._chats.of(own.chat).examples
        sides: dict[Side, list[Example]] = {}
        for example in checked_lines(chunk.numbered(), own.data, tally=tally, render=render):
            sides.setdefault(_side(chunk, own.data, example), []).append(example)
        return EncodedChunk(
            side=chunk.side,
            source=chunk.source,
            tally=tally,
            rows={
                side: encoded_rows(
                    found,
                    own.tokens,
                    source=chunk.source,
                    kept=_kept(chunk, found, own.kept) if side == "validation" and own.kept else None,
                )
                for side, found in sides.items()
            },
            examples=tally.good,
        )

    def fingerprint(self) -> str:
        """Names all that decides what ids parts have, and what parts chats: the base's files, and the libraries."""
        libraries = [version(name) for name in ("tokenizers", "jinja2")]
        rules = {side: [(own.tokens, own.chat, own.kept) for own in self._rules[side]] for side in self._rules}
        return hashlib.sha256(pickle.dumps((libraries, rules))).hexdigest()


def encoded_rows(
    examples: Sequence[Example],
    rules: TokenRules,
    *,
    source: int,
    kept: Sequence[Sequence[str | None]] | None = None,
) -> bytes:
    """Examples as a part of a file; arguments as of `rows_of`."""
    framed = [each for few in _few(examples) for each in encode_examples(few, rules)]
    return rows_of(examples, framed, source=source, kept=kept)


def _kept(chunk: Chunk, examples: Sequence[Example], names: Sequence[str]) -> list[list[str | None]]:
    """The named fields of each example's record, found again by where it stands."""
    # Two files of a chunk may have one name: then the lines come in the order of the examples.
    numbered = iter([(f"{file}:{number}", raw) for file, number, raw in chunk.numbered()])
    records = [next(raw for where, raw in numbered if where == example.where) for example in examples]
    return [[value_of(raw.removeprefix(BOM), name) for name in names] for raw in records]


def _side(chunk: Chunk, data: DataSection, example: Example) -> Side:
    held_out = data.validation
    if chunk.side == "train" and isinstance(held_out, Fraction) and is_held_out(example.digest, held_out.fraction):
        return "validation"
    return chunk.side


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
