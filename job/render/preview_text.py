"""Examples as they are learned -> text for a terminal: what is given and what is learned, in colours or in marks."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from job.core.data.preview import ExamplePreview, PreviewPiece, SourceTokens
from job.core.lines import cells
from job.core.visible import one_line, visible

_END = "\x1b[0m"
_GIVEN, _FAINT, _STRONG = "", "\x1b[2m", "\x1b[1m"
_LEARNED, _CONTROL, _CONTROL_LEARNED = "\x1b[32m", "\x1b[35m", "\x1b[1;32m"
_INDENT = "  "
_NAME = 24
"""Columns of a source's name in the table."""
_LEAST_ROOM = 20
"""Columns that text gets in the narrowest terminal."""


@dataclass(frozen=True, slots=True)
class _Atom:
    """What is not broken in the middle, if it fits on a line."""

    text: str
    style: str


def preview_lines(
    examples: Sequence[ExamplePreview],
    sources: Sequence[SourceTokens],
    *,
    width: int | None,
    colours: bool,
    ids: bool,
    hide: Callable[[str], str] = str,
) -> list[str]:
    """The sources as a table, what the marks mean, and each example.

    Args:
        examples: in the order in which they are shown.
        sources: their lengths.
        width: columns of the terminal; None: lines may have any length.
        colours: whether to paint; without, marks say what is learned.
        ids: whether to name each token's id.
        hide: takes secrets out of a text.
    """
    lines = [*token_lines(sources), "", *_broken(_legend(colours=colours), width, colours=colours), ""]
    for each in examples:
        lines += [*example_lines(each, width=width, colours=colours, ids=ids, hide=hide), ""]
    return lines[:-1]


def token_lines(sources: Sequence[SourceTokens]) -> list[str]:
    """A table of how long the examples are, in tokens, and what is not used of them."""
    column = max([len("source"), *(min(cells(each.name), _NAME) for each in sources)])
    lines = [f"{'source':<{column}} examples     tokens learned    min median    p95    max"]
    for each in sources:
        name = _as_long(_flat(each.name), column)
        share = each.learned / each.tokens if each.tokens else 0.0
        lines.append(
            f"{name} {each.examples:>8} {each.tokens:>10} {share:>7.1%}"
            f" {each.shortest:>6} {each.median:>6} {each.p95:>6} {each.longest:>6}"
        )
        left_out = each.examples - each.used
        counted = {"left out": left_out, "cut at max_length": each.truncated}
        lines += [f"{'':<{column}}   {n} of {each.examples} examples {what}" for what, n in counted.items() if n]
    return lines


def _as_long(text: str, columns: int) -> str:
    """Text that takes so much room, cut where it has to be."""
    while cells(text) > columns:
        text = text[:-1]
    return text + " " * (columns - cells(text))


def example_lines(
    example: ExamplePreview, *, width: int | None, colours: bool, ids: bool = False, hide: Callable[[str], str] = str
) -> list[str]:
    """One example: where it stands and how long it is, what the model sees of it, and what it does not see."""
    head = f"{hide(example.where)}  {example.shown} of {hide(example.source)}"
    figures = f"{example.tokens} tokens, {example.learned} learned"
    atoms = [_Atom(_flat(head), _STRONG), _Atom("  ", ""), _Atom(figures, "")]
    rows = _rows(atoms, width)
    rows += _rows(list(_body(example.pieces, colours=colours, ids=ids, hide=hide)), width, indent=_INDENT)
    for note in _notes(example):
        rows += _rows([_Atom(word, _FAINT) for word in _words(note)], width, indent=_INDENT)
    return [_painted(row, colours=colours) for row in rows]


def _notes(example: ExamplePreview) -> Iterator[str]:
    if example.left_out is not None:
        yield f"not trained on: {example.left_out}"
    if example.cut and example.left_out != "longer than max_length":
        shown = example.tokens - example.cut
        yield f"cut after {shown} of {example.tokens} tokens: the rest is not seen, and nor is the EOS"


def _legend(*, colours: bool) -> list[_Atom]:
    if colours:
        marks = [_Atom("given", _GIVEN), _Atom("learned", _LEARNED), _Atom("«control token»", _CONTROL)]
        marks += [_Atom("«learned control token»", _CONTROL_LEARNED), _Atom("▸ learning begins", _STRONG)]
    else:
        marks = [_Atom("given", ""), _Atom("[learned]learned[/learned]", ""), _Atom("«control token»", "")]
    marks += [_Atom("· a blank at a border", ""), _Atom("↵ a line break", "")]
    return [atom for mark in marks for atom in (mark, _Atom("  ", ""))][:-1]


def _body(pieces: Sequence[PreviewPiece], *, colours: bool, ids: bool, hide: Callable[[str], str]) -> Iterator[_Atom]:
    learning = False
    for number, piece in enumerate(pieces):
        if piece.learned is not learning:
            learning = piece.learned
            yield from _border(begins=learning, colours=colours)
        style = _style(piece)
        if piece.omitted:
            yield _Atom(f" ... {piece.omitted} tokens ... ", _FAINT)
        elif ids:
            yield from _tokens(piece, style, hide)
        elif piece.control:
            yield _Atom(f"«{_flat(piece.text)}»", style)
        else:
            after = pieces[number + 1] if number + 1 < len(pieces) else None
            yield from _text(piece, pieces[number - 1] if number else None, after, style, hide)
    if learning and not colours:
        yield _Atom("[/learned]", "")


def _border(*, begins: bool, colours: bool) -> Iterator[_Atom]:
    if not colours:
        yield _Atom("[learned]" if begins else "[/learned]", "")
    elif begins:
        yield _Atom("▸", _STRONG)


def _style(piece: PreviewPiece) -> str:
    if piece.control:
        return _CONTROL_LEARNED if piece.learned else _CONTROL
    return _LEARNED if piece.learned else _GIVEN


def _tokens(piece: PreviewPiece, style: str, hide: Callable[[str], str]) -> Iterator[_Atom]:
    """Each as `'text'=id`, a control token as `«text»=id`."""
    secret = hide(piece.text) != piece.text
    for text, token in zip(piece.tokens, piece.ids, strict=True):
        shown = f"«{_flat(text)}»" if piece.control else repr("***" if secret else text)
        yield _Atom(f"{shown}={token} ", style)


def _text(
    piece: PreviewPiece,
    before: PreviewPiece | None,
    after: PreviewPiece | None,
    style: str,
    hide: Callable[[str], str],
) -> Iterator[_Atom]:
    """Words and blanks; those at a border can be seen."""
    text = visible(hide(piece.text)).replace("\t", r"\t")
    if before is not None and before.learned is not piece.learned:
        text = re.sub("^ +", lambda blanks: "·" * len(blanks[0]), text)
    if after is not None and after.learned is not piece.learned:
        text = re.sub(" +$", lambda blanks: "·" * len(blanks[0]), text)
    for word in _words(text.replace("\n", "↵\n")):
        yield _Atom(word, style)


def _flat(text: str) -> str:
    return one_line(text).replace("\t", r"\t")


def _words(text: str) -> list[str]:
    return re.findall(r"\n| +|[^ \n]+", text)


def _broken(atoms: Sequence[_Atom], width: int | None, *, colours: bool) -> list[str]:
    return [_painted(row, colours=colours) for row in _rows(atoms, width)]


def _rows(atoms: Sequence[_Atom], width: int | None, *, indent: str = "") -> list[list[_Atom]]:
    """Atoms on lines that fit; blanks where a line is broken are not written."""
    rows: list[list[_Atom]] = [[]]
    most = None if width is None else max(width - len(indent), _LEAST_ROOM)
    room = most
    for atom in atoms:
        if atom.text == "\n":
            rows.append([])
            room = most
            continue
        text = atom.text
        while most is not None and room is not None and cells(text) > room:
            if room < most:  # the next line is longer
                text = text.lstrip(" ")
            else:
                cut = next(at for at in range(len(text), 0, -1) if cells(text[:at]) <= room)
                rows[-1].append(_Atom(text[:cut], atom.style))
                text = text[cut:]
            rows.append([])
            room = most
        if text:
            rows[-1].append(_Atom(text, atom.style))
        if room is not None:
            room -= cells(text)
    if not rows[-1]:
        rows.pop()
    return [[_Atom(indent, ""), *row] if row else [] for row in rows]


def _painted(row: Sequence[_Atom], *, colours: bool) -> str:
    """One line; neighbours of one style are painted together."""
    line, style = "", ""
    for atom in row:
        if colours and atom.style != style:
            line += (_END if style else "") + atom.style
            style = atom.style
        line += atom.text
    return (line + _END if style else line).rstrip()
