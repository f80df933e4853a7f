"""What a template says: which fields it names, which may be left out, and what of it vanishes with them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter

_NAME = re.compile(r"[^\W\d][\w -]*(?:\.\w[\w -]*)*")
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where a field of the record stands."""

    name: str
    optional: bool
    """`{name?}`: nothing stands there where the record has no such field, or a blank one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What stands in square brackets around optional fields: it is there where all of those are."""

    pieces: "tuple[Piece, ...]"

    @property
    def needs(self) -> tuple[str, ...]:
        """The optional fields that it holds directly."""
        return tuple(piece.name for piece in self.pieces if isinstance(piece, Slot) and piece.optional)


Piece = str | Slot | Group


@lru_cache(maxsize=64)
def parsed(template: str) -> tuple[Piece, ...]:
    """A template's own text, its fields and its groups, in their order.

    Raises:
        ValueError: unbalanced braces, more than a field's name between them, or a group that is not closed.
    """
    open_brackets: list[list[Piece]] = [[]]
    for literal, name, spec, conversion in Formatter().parse(template):
        for letters in re.split(r"([\[\]])", literal):
            _add_text(open_brackets, letters)
        if name is not None:
            open_brackets[-1].append(_slot(name, spec, conversion))
    while len(open_brackets) > 1:
        inner = open_brackets.pop()
        if needed := Group(pieces=tuple(inner)).needs:
            raise ValueError(f"the square bracket before {{{needed[0]}?}} is not closed; write [... {{{needed[0]}?}}]")
        open_brackets[-1] += ["[", *inner]
    return _joined(open_brackets[0])


def _add_text(open_brackets: list[list[Piece]], letters: str) -> None:
    if letters == "[":
        open_brackets.append([])
    elif letters == "]" and len(open_brackets) > 1:
        inner = open_brackets.pop()
        group = Group(pieces=_joined(inner))
        open_brackets[-1] += [group] if group.needs else ["[", *inner, "]"]
    elif letters:
        open_brackets[-1].append(letters)


def _slot(name: str, spec: str | None, conversion: str | None) -> Slot:
    plain = name.removesuffix("?")
    if spec or conversion or not _NAME.fullmatch(plain):
        shown = "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
        hint = "; the messages of a chat are read by data.chat" if "[" in name else ""
        raise ValueError(
            f"{shown} is not a field name; write {{name}}, {{name?}} for one that may be left out, {{outer.inner}} for "
            f"one inside an object, and {{{{ }}}} doubled for literal braces{hint}"
        )
    return Slot(name=plain, optional=name.endswith("?"))


def _joined(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)


def slots(template: str) -> list[Slot]:
    """Every place of a field, in order."""
    return [piece for piece in laid_out(template, lambda _name: True) if isinstance(piece, Slot)]


def template_fields(template: str) -> list[str]:
    """The record fields that a template names, in order."""
    return [slot.name for slot in slots(template)]


def answer_field(text: str) -> str:
    """The field of a `text` template that is the answer: the last one that must be there, else the last one."""
    found = slots(text)
    return [slot.name for slot in found if not slot.optional or all(other.optional for other in found)][-1]


def laid_out(template: str, has: Callable[[str], bool]) -> Iterator[str | Slot]:
    """A template's own text and its fields where the record has these optional ones; the others are left out."""
    yield from _laid_out(parsed(template), has)


def _laid_out(pieces: Sequence[Piece], has: Callable[[str], bool]) -> Iterator[str | Slot]:
    for piece in pieces:
        if isinstance(piece, Group):
            if all(map(has, piece.needs)):
                yield from _laid_out(piece.pieces, has)
        elif isinstance(piece, str) or not piece.optional or has(piece.name):
            yield piece


def filled(template: str, fields: Mapping[str, str | None]) -> Iterator[tuple[str, bool]]:
    """Stretches of text, each with whether it is the template's own, and not a field's.

    Args:
        template: as it was checked before.
        fields: a value for each field; None: there is none, and the field is optional.
    """
    own = ""
    for piece in _laid_out(parsed(template), lambda name: fields[name] is not None):
        if isinstance(piece, str):
            own += piece
            continue
        if own:
            yield own, True
            own = ""
        yield fields[piece.name] or "", False
    if own:
        yield own, True


def with_optional(template: str, name: str) -> str | None:
    """The same template with one field optional, and with what belongs to it in brackets; None: there is no such way.

    A record that has the field becomes the same text by both.
    """
    whole = _shape(template)
    for written in (_bracketed(template, name), template.replace(f"{{{name}}}", f"{{{name}?}}")):
        with suppress(ValueError):  # brackets of its own stand in the way
            if written is not None and written != template and _shape(written) == whole:
                return written
    return None


def _shape(template: str) -> str:
    pieces = laid_out(template, lambda _name: True)
    return "".join(piece if isinstance(piece, str) else f"\0{piece.name}\0" for piece in pieces)


def _bracketed(template: str, name: str) -> str | None:
    """With a group around the field: from the start of its paragraph or line to the break behind it."""
    tokens = [each for each in _TOKEN.finditer(template) if each[1] is not None]
    places = [place for place, each in enumerate(tokens) if each[1] == name]
    if len(places) != 1:
        return None
    place = places[0]
    start, end = tokens[place].span()
    before = tokens[place - 1].end() if place else 0
    after = tokens[place + 1].start() if place + 1 < len(tokens) else len(template)
    first, last = _extent(template[before:start], template[end:after], follows=place > 0)
    first, last = before + first, end + last
    return f"{template[:first]}[{template[first:start]}{{{name}?}}{template[end:last]}]{template[last:]}"


def _extent(before: str, after: str, *, follows: bool) -> tuple[int, int]:
    """Where in the text before a field its group begins, and where in the text behind it the group ends.

    Args:
        before: up to the field before it.
        after: up to the next field.
        follows: whether there is a field before it.
    """
    heading = before.rstrip()
    for gap in ("\n\n", "\n"):
        if gap not in before and (follows or gap not in after):
            continue
        found = heading.rfind(gap) if heading else before.rfind(gap)
        if found == -1 and follows:
            continue
        begins = found + len(gap) if found != -1 else 0
        if gap in after:
            return begins, after.index(gap) + len(gap)
        return max(found, 0), 0  # nothing follows that it could be apart from: the break before it goes with it
    if follows:
        return 0, 0
    opened = max(before.rfind(mark) for mark in "]>") + 1  # a tag that opens what comes is none of the field's
    begins = opened + len(before[opened:]) - len(before[opened:].lstrip())
    separator = re.match(r"[^\w<\[]*", after)
    return begins, separator.end() if separator is not None else 0
