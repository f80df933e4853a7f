"""JSON lines -> checked examples, with line-numbered errors; and the train/validation split."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from job.core.close_names import closest
from job.core.data_section import DataSection
from job.core.errors import DataError

REPORTED_AT_ONCE = 20
"""Wrong lines named in one message."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of an example's text."""

    text: str
    learned: bool
    """Whether the model learns to write it; if not, it is what the model is given."""
    control: bool = False
    """Whether control tokens written in it are meant as such: in a template's own text, and never in a field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One record as text: parts that are given and parts that are learned, in their order."""

    parts: tuple[Part, ...]
    where: str
    """`file:line`, for messages."""

    @property
    def text(self) -> str:
        """The parts, joined."""
        return "".join(part.text for part in self.parts)

    @property
    def borders(self) -> tuple[int, ...]:
        """Characters before learning begins, before it ends, before it begins again, and so on; ascending.

        Learning does not end with the text: an odd number of borders means that the last part is learned.
        """
        borders, learning, characters = [], False, 0
        for part in self.parts:
            if part.learned is not learning:
                borders.append(characters)
                learning = part.learned
            characters += len(part.text)
        return tuple(borders)

    @property
    def digest(self) -> bytes:
        """16 bytes that name the content, wherever it stands: the text, and what of it is learned."""
        borders = ",".join(map(str, self.borders))
        return hashlib.sha256(f"{borders}:{self.text}".encode()).digest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRecord:
    """One wrong line and its reason."""

    where: str
    reason: str

    def __str__(self) -> str:
        """`file:line: reason`."""
        return f"{self.where}: {self.reason}"

    @property
    def kind(self) -> str:
        """The reason without what differs from line to line."""
        return self.reason.partition(" (")[0]


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was seen while reading; filled by `examples`."""

    lines: int = 0
    """Lines that are not blank."""
    good: int = 0
    bad: int = 0
    first_bad: list[BadRecord] = field(default_factory=list)
    """The first wrong lines, at most REPORTED_AT_ONCE."""
    kinds: set[str] = field(default_factory=set)
    """Of all wrong lines; there are few."""

    def add_bad(self, record: BadRecord) -> None:
        """Count a wrong line and keep it when it is among the first."""
        self.bad += 1
        self.kinds.add(record.kind)
        if len(self.first_bad) < REPORTED_AT_ONCE:
            self.first_bad.append(record)

    def merge(self, other: "Tally") -> None:
        """Add what was seen in other files."""
        self.lines += other.lines
        self.good += other.good
        self.bad += other.bad
        self.kinds |= other.kinds
        self.first_bad = (self.first_bad + other.first_bad)[:REPORTED_AT_ONCE]

    def message(self) -> str:
        """The wrong lines as one message: a line each, then the total; one for all, if all are wrong in one way."""
        if self.lines == self.bad > 1 and len(self.kinds) == 1:
            first = self.first_bad[0]
            return f"{self.bad} wrong lines of {self.lines}\n  in all {self.lines} lines: {first.reason}"
        lines = [str(record) for record in self.first_bad]
        if self.bad > len(lines):
            lines.append(f"... and {self.bad - len(lines)} more")
        count = "1 wrong line" if self.bad == 1 else f"{self.bad} wrong lines"
        return "\n  ".join([f"{count} of {self.lines}", *lines])


def examples(lines: Iterable[tuple[str, int, bytes]], data: DataSection, *, tally: Tally) -> Iterator[Example]:
    """The examples of all lines there are, and a judgement at their end; see `checked_lines` and `judge_lines`."""
    yield from checked_lines(lines, data, tally=tally)
    judge_lines([tally], data)


def checked_lines(lines: Iterable[tuple[str, int, bytes]], data: DataSection, *, tally: Tally) -> Iterator[Example]:
    """Check and render each line; wrong ones are counted in the tally and left out.

    Args:
        lines: file name, line number (from 1) and the raw bytes without the line end.
        data: the templates.
        tally: filled while the caller reads.
    """
    for source, number, raw in lines:
        body = raw.removeprefix(_BOM) if number == 1 else raw
        if not body.strip():
            continue
        tally.lines += 1
        parsed = parse_line(body, data, where=f"{source}:{number}")
        if isinstance(parsed, BadRecord):
            tally.add_bad(parsed)
        else:
            tally.good += 1
            yield parsed


def judge_lines(sides: Iterable[Tally], data: DataSection) -> None:
    """Report the wrong lines of all sides together; each side is held to the limit by itself.

    Raises:
        DataError: more are wrong than the recipe accepts.
    """
    tally, share = Tally(), 0.0
    for side in sides:
        tally.merge(side)
        share = max(share, side.bad / side.lines if side.lines else 0.0)
    is_noise = share <= data.bad_record_limit
    if tally.bad and data.on_bad_record == "fail":
        raise DataError(f"{tally.message()}\n{_advice(tally, data, can_skip=is_noise)}")
    if not is_noise:
        raise DataError(
            f"{tally.message()}\n{share:.2%} of the lines are wrong, more than data.bad_record_limit "
            f"({data.bad_record_limit:.2%}) accepts as noise; {_advice(tally, data, can_skip=False)}"
        )


def _advice(tally: Tally, data: DataSection, *, can_skip: bool) -> str:
    """What helps, and nothing else: too many wrong lines are not left out."""
    ways = ["correct them"]
    missing = [name for name in data.fields if f'"{name}" is missing' in tally.kinds]
    if missing:
        templates = [f"data.{name}" for name in ("text", "prompt", "completion") if getattr(data, name) is not None]
        ways.append(f"name in {' and '.join(templates)} the fields that the records have")
    if can_skip:
        ways.append("set data.on_bad_record: skip")
    return ", or ".join(ways)


def parse_line(raw: bytes, data: DataSection, *, where: str) -> Example | BadRecord:
    """One line -> an example, or why it is none."""
    if len(raw) > data.max_record:
        too_long = f"longer than data.max_record ({data.max_record:,} bytes)"
        return BadRecord(where=where, reason=f"{too_long}; split the record, or raise data.max_record")
    fields = fields_of(raw, data.fields)
    if isinstance(fields, str):
        return BadRecord(where=where, reason=fields)
    return Example(parts=_parts(fields, data), where=where)


def _parts(fields: dict[str, str], data: DataSection) -> tuple[Part, ...]:
    """A text is learned as a whole; of prompt and completion the completion is.

    `loss_on: all` is applied to the token ids: an example keeps its name, and so its side, whatever the loss is over.
    """
    templates = ((data.text, True), (data.prompt, False), (data.completion, True))
    return tuple(
        part
        for template, learned in templates
        if template is not None
        for part in filled_in(template, fields, learned=learned)
    )


def filled_in(template: str, fields: Mapping[str, str], *, learned: bool) -> Iterator[Part]:
    """A template's own text and the fields that it names, in their order; the template was checked before."""
    for literal, name, *_ in Formatter().parse(template):
        if literal:
            yield Part(text=literal, learned=learned, control=True)
        if name is not None:
            yield Part(text=fields[name], learned=learned)


def fields_of(raw: bytes, names: Iterable[str]) -> dict[str, str] | str:
    """The named fields of one record, or the reason why they are not there."""
    record = _record(raw)
    if isinstance(record, str):
        return record
    fields = {}
    for name in names:
        reason = _field_reason(record, name)
        if reason is not None:
            return f'"{name}" {reason}'
        fields[name] = record[name]
    return fields


def _record(raw: bytes) -> dict[str, Any] | str:
    """The JSON object of one line, or the reason why it is none."""
    if b"\0" in raw:
        return "holds a NUL byte"
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line)"
    except RecursionError:
        return "nested too deeply"
    except ValueError as error:
        return _not_json(error)
    return record if isinstance(record, dict) else f"not a JSON object but {_json_kind(record)}"


def _not_json(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg}, column {error.colno})"
    return "holds a number with too many digits"


def _field_reason(record: dict[str, object], name: str) -> str | None:
    if name not in record:
        return "is missing" + (f" (the record has {_listed(record, name)})" if record else " (the record is empty)")
    value = record[name]
    if not isinstance(value, str):
        return f"is {_json_kind(value)}, not a string"
    if not value.strip():
        return "is empty"
    if "\0" in value:
        return "holds a NUL character"
    if not _is_text(value):
        return "holds half a surrogate pair, which is no character"
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(record: dict[str, object], wanted: str, most: int = 6) -> str:
    """The record's names, and the one that looks like the name that was looked for."""
    names = {_as_json(name): name[:40] for name in list(record)[:most]}
    meant = closest(wanted, names.values())
    hint = "" if meant is None else f"; did you mean {_as_json(meant)}?"
    return ", ".join(names) + (", ..." if len(record) > most else "") + hint


def _as_json(name: str) -> str:
    # So that a line stays a line; half a surrogate pair could not be written into the report.
    return json.dumps(name[:40], ensure_ascii=not _is_text(name))


def _json_kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether an example belongs to validation: by its content alone, so it stays there when the file grows."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
