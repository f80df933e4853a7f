"""Examples as they are learned, as values: what is given, what is learned, where one is cut, and how long they are."""

from typing import Literal

from job.core.section import Section

Shown = Literal["first", "longest", "shortest", "random"]


class PreviewPiece(Section):
    """A stretch of an example's tokens that are all given or all learned."""

    text: str
    """What it reads as; empty where it is not shown."""
    learned: bool
    """Whether the loss is over it."""
    control: bool
    """Whether it is a control token: it means something to the model beyond its letters."""
    ids: tuple[int, ...] = ()
    """Its tokens; none where it is not shown."""
    tokens: tuple[str, ...] = ()
    """What each reads as, where that was asked for."""
    omitted: int = 0
    """Tokens of it that are left out here, since there are too many to show."""


class ExamplePreview(Section):
    """One example of the training side."""

    where: str
    """`file:line`."""
    source: str
    shown: Shown
    """Why this one."""
    tokens: int
    """Before the cut, BOS and EOS included."""
    learned: int
    """Tokens that the loss is over, after the cut."""
    cut: int
    """Tokens beyond max_length: they are not learned from, and nor is the EOS among them."""
    left_out: Literal["longer than max_length", "nothing to learn from"] | None
    """Why it is not trained on; None: it is."""
    pieces: tuple[PreviewPiece, ...]


class SourceTokens(Section):
    """The lengths of a source's examples, in tokens."""

    name: str
    examples: int
    used: int
    """Examples that are trained or judged on."""
    tokens: int
    """Of the used ones after the cut, ..."""
    learned: int
    """... and how many of them the loss is over."""
    shortest: int
    """Before the cut, as the next ones."""
    median: int
    p95: int
    longest: int
    truncated: int
    """Examples that are cut at max_length."""
