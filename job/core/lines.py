"""Text for a terminal: broken at words to its width, values written out, the small parts of a whole added up."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_LEAST_SHARE = 0.01
"""Of the whole: a part below it is added to the others."""
_OTHERS = "other"
_COMMAND = "python -c "
"""Begins a line that is pasted into a shell."""
_NEAR = 0.5
"""Of the width: a column that begins further to the right leaves no room to hang text below it."""


def cells(text: str) -> int:
    """How many columns a text takes: East Asian characters two, what is set above another one none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text
    )


def broken(text: str, width: int | None, *, indent: int = 0, taken: int = 0) -> list[str]:
    """One line of text as pieces that fit the width, broken at spaces.

    A path, a URI or a command is kept whole, for it is copied: a path that is longer than a line stands in the first
    column.

    Args:
        text: without line breaks.
        width: columns of the terminal; None: it has no end.
        indent: spaces before each piece but the first.
        taken: columns that are taken before the first piece.
    """
    if width is None or taken + cells(text) <= width or text.lstrip().startswith(_COMMAND):
        return [text]
    pieces, piece, room = [], "", width - taken
    for space, word in _words(text, most=width):
        if cells(piece + space + word) <= room:
            piece += space + word
            continue
        if piece or taken:
            pieces.append(piece)
        taken, room = 0, width
        piece = word if cells(word) + indent > width else " " * indent + word
    return [*pieces, piece]


def hung(text: str, width: int | None) -> list[str]:
    """A line of a report as pieces that fit the width; each hangs below the column where the first one's text begins.

    A column is what follows two spaces, as in `adapter    s3://...`; without one, pieces are set in a little.
    """
    if width is None:
        return [text]
    text = text.expandtabs()
    if cells(text) <= width:
        return [text]
    own = len(text) - len(text.lstrip(" "))
    column = re.match(r" *\S+(?: \S+)*  +", text)
    indent = column.end() if column is not None and column.end() <= _NEAR * width else own + 2
    return broken(text, width, indent=indent)


def _words(text: str, *, most: int) -> Iterator[tuple[str, str]]:
    """Each word with the spaces before it; one wider than a line is cut, unless it is a path."""
    for match in re.finditer(r"( *)([^ ]+)| +$", text):
        space, word = match[1] or "", match[2] or ""
        while cells(word) > most and "/" not in word:
            cut = next(at for at in range(len(word), 0, -1) if cells(word[:at]) <= most)
            yield space, word[:cut]
            space, word = "", word[cut:]
        yield space, word


def written_out(values: Mapping[str, Any]) -> list[str]:
    """Each value as `key=value`; what is inside another one by its path, `spent.encode=1.5`."""
    return [f"{key}={_shown(value)}" for key, value in _flat(values)]


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{key}.{inner}", each) for inner, each in _flat(value))
        elif isinstance(value, Sequence) and any(isinstance(each, Mapping) for each in value):
            numbered = {f"{key}.{number}": each for number, each in enumerate(value)}
            yield from _flat(numbered)
        else:
            yield key, value


def _shown(value: object) -> str:
    match value:
        case None | Mapping() | ():
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case list() | tuple() | set() | frozenset():
            return ",".join(_shown(each) for each in value) or "-"
    text = str(value)
    # Quoted where it would run into its neighbours, or carry a control character to the terminal.
    return text if text and text.isprintable() and " " not in text else repr(text)


def worth_naming(parts: Mapping[str, float]) -> dict[str, float]:
    """The parts of at least a hundredth of their sum, the largest first; what is left comes last, as one part."""
    least = _LEAST_SHARE * sum(parts.values())
    largest = sorted(parts.items(), key=lambda each: -each[1])
    named = {name: part for name, part in largest if part >= least and name != _OTHERS}
    rest = sum(part for name, part in parts.items() if name not in named)
    return named | ({_OTHERS: rest} if rest > 0 else {})


def colours_wanted(environment: Mapping[str, str], *, terminal: bool) -> bool:
    """Whether to write in colours: NO_COLOR forbids them (no-color.org), CLICOLOR_FORCE wants them anywhere."""
    if environment.get("NO_COLOR"):
        return False
    if environment.get("CLICOLOR_FORCE", "0") not in {"", "0"}:
        return True
    return terminal and environment.get("CLICOLOR") != "0" and environment.get("TERM") != "dumb"
