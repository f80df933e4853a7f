"""JSON lines -> checked examples, with line-numbered errors; and the train/validation split."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from job.core.data.chats import Chat, chat_of
from job.core.data.fields import Unusable, fields_of, record_of
from job.core.errors import DataError
from job.core.recipe.data_section import DataSection
from job.core.recipe.templates import filled, with_optional

REPORTED_AT_ONCE = 20
"""Wrong lines named in one message."""
BOM = b"\xef\xbb\xbf"
"""Before the first record of a file; of a compressed file that was put together from several, before any."""


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
    is_chat: bool = False
    """Whether a chat template wrote all of it: BOS, where there is one, is in it already."""

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
    blank: str | None = None
    """The field that is empty, where that is the reason."""
    unanswered: bool = False
    """Whether it is right but for its answer, which is empty: nothing can be learned of it."""

    def __str__(self) -> str:
        """`file:line: reason`."""
        return f"{self.where}: {self.reason}"

    @property
    def kind(self) -> str:
        """The reason without what differs from line to line."""
        return self.reason.partition(" (")[0]


Parsed = Example | Chat | BadRecord
"""What a line holds: a chat becomes an example once a template has rendered it."""
Render = Callable[[Iterable[Parsed]], Iterator[Example | BadRecord]]
"""Renders the chats, in their order, and leaves all else as it is."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was seen while reading; filled by `examples`."""

    side: str = ""
    """What messages call these lines, where there are others: `data.train`."""
    lines: int = 0
    """Lines that are not blank."""
    good: int = 0
    bad: int = 0
    """Wrong lines."""
    empty: int = 0
    """Lines whose answer is empty: they are left out, and are not wrong."""
    blank: Counter[str] = field(default_factory=Counter)
    """Wrong lines that are so because a field that must be there is empty, by that field."""
    first_bad: list[BadRecord] = field(default_factory=list)
    """The first lines that are wrong or have no answer, at most REPORTED_AT_ONCE."""
    kinds: set[str] = field(default_factory=set)
    """Of all of them; there are few."""

    def add_bad(self, record: BadRecord) -> None:
        """Count a line that is no example and keep it when it is among the first."""
        if record.unanswered:
            self.empty += 1
        else:
            self.bad += 1
            if record.blank is not None:
                self.blank[record.blank] += 1
        self.kinds.add(record.kind)
        if len(self.first_bad) < REPORTED_AT_ONCE:
            self.first_bad.append(record)

    def merge(self, other: "Tally") -> None:
        """Add what was seen in other files."""
        self.lines += other.lines
        self.good += other.good
        self.bad += other.bad
        self.empty += other.empty
        self.blank += other.blank
        self.kinds |= other.kinds
        self.first_bad = (self.first_bad + other.first_bad)[:REPORTED_AT_ONCE]

    def message(self) -> str:
        """The wrong lines as one message: a line each, then the total; one for all, if all are wrong in one way."""
        if self.lines == self.bad > 1 and len(self.kinds) == 1:
            first = self.first_bad[0]
            return f"{self.bad} wrong lines of {self.lines}\n  in all {self.lines} lines: {first.reason}"
        lines = [str(record) for record in self.first_bad]
        if self.bad + self.empty > len(lines):
            lines.append(f"... and {self.bad + self.empty - len(lines)} more")
        count = "1 wrong line" if self.bad == 1 else f"{self.bad} wrong lines"
        unanswered = f", {self.empty} without an answer" if self.empty else ""
        return "\n  ".join([f"{count} of {self.lines}{unanswered}", *lines])

    @property
    def share_wrong(self) -> float:
        """Wrong lines of all."""
        return self.bad / self.lines if self.lines else 0.0


def checked_lines(
    lines: Iterable[tuple[str, int, bytes]],
    data: DataSection,
    *,
    tally: Tally,
    render: Render | None = None,
) -> Iterator[Example]:
    """Check and render each line; wrong ones are counted in the tally and left out.

    Args:
        lines: file name, line number (from 1) and the raw bytes without the line end.
        data: the templates.
        tally: filled while the caller reads.
        render: makes examples of chats; without it they are checked and counted, and give none.
    """
    parsed = _parsed_lines(lines, data, tally)
    for each in parsed if render is None else render(parsed):
        if isinstance(each, BadRecord):
            tally.add_bad(each)
            continue
        tally.good += 1
        if isinstance(each, Example):
            yield each


def _parsed_lines(lines: Iterable[tuple[str, int, bytes]], data: DataSection, tally: Tally) -> Iterator[Parsed]:
    for file, number, raw in lines:
        body = raw.removeprefix(BOM)
        if not body.strip():
            continue
        tally.lines += 1
        yield parse_line(body, data, where=f"{file}:{number}")


def judge_lines(sides: Iterable[Tally], data: DataSection) -> None:
    """Report the wrong lines of all sides together; each side is held to the limit by itself.

    Raises:
        DataError: more are wrong than the recipe accepts.
    """
    tally, worst = Tally(), Tally()
    for side in sides:
        tally.merge(side)
        worst = max(worst, side, key=lambda each: each.share_wrong)
    is_noise = worst.share_wrong <= data.bad_record_limit
    if tally.bad and data.on_bad_record == "fail":
        raise DataError(f"{tally.message()}\n{_advice(tally, data, can_skip=is_noise)}")
    if not is_noise:
        lines = f"lines of {worst.side}" if worst.side else "lines"
        raise DataError(
            f"{tally.message()}\n{worst.bad} of {worst.lines} {lines} are wrong ({worst.share_wrong:.2%}), more than "
            f"data.bad_record_limit ({data.bad_record_limit:.2%}) accepts as noise; "
            f"{_advice(tally, data, can_skip=False)}"
        )


def _advice(tally: Tally, data: DataSection, *, can_skip: bool) -> str:
    """What helps, and nothing else: too many wrong lines are not left out."""
    ways = ["correct them"]
    wanted = data.fields if data.chat is None else (data.chat,)
    if any(f'"{name}" is missing' in tally.kinds for name in wanted):
        templates = [
            f"data.{name}" for name in ("text", "prompt", "completion", "chat") if getattr(data, name) is not None
        ]
        ways.append(f"name in {' and '.join(templates)} the fields that the records have")
    if can_skip:
        ways.append("set data.on_bad_record: skip")
    absent = (
        ("is empty", "is null, not a string", "is missing") if tally.good else ("is empty", "is null, not a string")
    )
    left_out = [name for name in data.fields if any(f'"{name}" {why}' in tally.kinds for why in absent)]
    return ", or ".join(ways) + optional_form(data, left_out)


def optional_form(data: DataSection, names: Iterable[str]) -> str:
    """The recipe's own templates with these fields optional, as the end of a message; empty: there is no such way."""
    lines = []
    for key in ("text", "prompt", "completion"):
        template = getattr(data, key)
        if template is None:
            continue
        written = template
        those: list[str] = []
        for name in names:
            # An answer that is not there is nothing to learn.
            if key == "prompt" or data.answers != {name}:
                optional = with_optional(written, name)
                written, those = optional or written, those + [name] * (optional is not None)
        if written != template:
            shown = ", ".join(f'"{name}"' for name in those)
            lines.append(
                f"\nWhere {shown} may be left out, let what belongs to it vanish with it:\n"
                f"  data.{key}: {json.dumps(written, ensure_ascii=False)}"
            )
    return "".join(lines)


def parse_line(raw: bytes, data: DataSection, *, where: str) -> Parsed:
    """One line -> an example or a chat, or why it is none."""
    if len(raw) > data.max_record:
        too_long = f"longer than data.max_record ({data.max_record:,} bytes)"
        return BadRecord(where=where, reason=f"{too_long}; split the record, or raise data.max_record")
    if data.chat is not None:
        chat = chat_in(raw, data, where=where)
        return BadRecord(where=where, reason=chat) if isinstance(chat, str) else chat
    fields = fields_of(raw, data.fields, required=data.required, strict_types=data.strict_types)
    if isinstance(fields, Unusable):
        # Of an answer that is empty nothing can be learned, and nothing else is wrong with the record.
        unanswered = fields.blank in data.answers
        return BadRecord(where=where, reason=fields.reason, blank=fields.blank, unanswered=unanswered)
    if all(fields[name] is None for name in data.answers):
        names = ", ".join(f'"{name}"' for name in sorted(data.answers))
        return BadRecord(where=where, reason=f"the answer is empty (nothing of {names} is there)", unanswered=True)
    return Example(parts=_parts(fields, data), where=where)


def _parts(fields: Mapping[str, str | None], data: DataSection) -> tuple[Part, ...]:
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


def filled_in(template: str, fields: Mapping[str, str | None], *, learned: bool) -> Iterator[Part]:
    """A template's own text and the fields that it names, in their order; the template was checked before."""
    for text, own in filled(template, fields):
        yield Part(text=text, learned=learned, control=own)


def chat_in(raw: bytes, data: DataSection, *, where: str, asked: bool = False) -> Chat | str:
    """The conversation of one record of a chat data set, or the reason why it holds none; see `chat_of`."""
    record = record_of(raw)
    if isinstance(record, str):
        return record
    drop = data.reasoning == "drop"
    field, tools = data.chat or "", data.tools
    return chat_of(record, field=field, tools=tools, drop_reasoning=drop, where=where, asked=asked)


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Whether an example belongs to validation: by its content alone, so it stays there when the file grows."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
