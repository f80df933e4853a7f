"""What a page is made of: a few kinds of blocks, plain values that the template sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup

from job.core.data.preview import ExamplePreview


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """A paragraph."""

    kind: ClassVar[str] = "words"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Lines of equal rank."""

    kind: ClassVar[str] = "listing"
    items: Sequence[str]
    left_out: int = 0
    """Lines that have no room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Names with what they are."""

    kind: ClassVar[str] = "facts"
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows below a head; the first cell of a row names it."""

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    """Columns that hold words; the others hold figures."""
    marked: int | None = None
    """The row that is the chosen one."""
    left_out: int = 0
    """Rows that have no room."""
    rest_in: str = "report.json"
    """Where those are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A drawing, with what it shows in words."""

    kind: ClassVar[str] = "picture"
    drawing: Markup
    caption: str
    is_wide: bool = False
    """Whether it has a row of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Drawings side by side, where there is room."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Lines to be copied."""

    kind: ClassVar[str] = "code"
    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A training example with what is learned of it."""

    kind: ClassVar[str] = "example"
    example: ExamplePreview
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownAnswer:
    """One prompt, answered by both."""

    prompt: str
    expected: str | None
    reference: str | None
    """What the metric compared with, where that is not `expected`."""
    base: str
    champion: str | None
    """Of the model in use; None: there is none but the base, or it is not known."""
    tuned: str
    state: str
    """`right`, `wrong`, or `asked` where no answer is expected."""
    figures: str
    """Where it stands, and what became of its loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Answers of both, with a filter."""

    kind: ClassVar[str] = "answers"
    answers: Sequence[ShownAnswer]
    """That are seen at once."""
    folded: Sequence[ShownAnswer]
    """That are seen when they are asked for."""
    left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """What is shown when it is asked for."""

    kind: ClassVar[str] = "fold"
    name: str
    blocks: Sequence["Block"]


Block = Words | Listing | Facts | Table | Picture | Pictures | Code | Example | Answers | Fold


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """A part of the page that its contents name."""

    anchor: str
    name: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """All of it."""

    title: str
    standing: str
    """In a word or two: finished, not finished, several runs."""
    verdict: str
    figures: Mapping[str, str]
    """The few that are looked for first."""
    to_do: Sequence[str]
    """What to do next; empty: nothing was seen."""
    to_do_none: str
    """What is said then."""
    chapters: Sequence[Chapter]
    made_by: str | None = None
    """The version of the job that finished the run; None: it is not finished, or does not say."""

    @property
    def has_answers(self) -> bool:
        """Whether there is something to filter."""
        return any(isinstance(block, Answers) for chapter in self.chapters for block in chapter.blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much of what has no end is shown."""

    characters: int = 2000
    """Of one text."""
    rows: int = 60
    """Of a table, and lines of a list."""
    answers: int = 60
    recipe: int = 30_000
    """Characters of the recipe."""

    def halved(self) -> "Room":
        """The next smaller one."""
        return Room(
            characters=self.characters // 2,
            rows=max(1, self.rows // 2),
            answers=max(1, self.answers // 2),
            recipe=self.recipe // 2,
        )

    def cut(self, text: str) -> str:
        """A text that has room, with how much of it is left out."""
        return cut(text, self.characters)


def cut(text: str, most: int) -> str:
    """The beginning of a text, with how much of it is left out."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"
