"""Prompts for a tuned model, from what a person types and from the fields of a record."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from job.core.close_names import did_you_mean
from job.core.data.records import Part, filled_in
from job.core.errors import UsageError
from job.core.recipe.data_section import DataSection
from job.core.recipe.templates import Slot, answer_field, laid_out, slots


def typed(text: str) -> str:
    r"""What somebody means who types one line: `\n` is a line break, and `\\n` a backslash with an n."""
    return re.sub(r"(\\?)\\n", lambda found: r"\n" if found[1] else "\n", text)


def asked_fields(data: DataSection) -> tuple[str, ...]:
    """The fields that a prompt is made of: those of `prompt`; those of `text` before the answer; of chats none."""
    return tuple(dict.fromkeys(slot.name for slot in _asked(data)))


def required_fields(data: DataSection) -> frozenset[str]:
    """Those of them that must be there."""
    return frozenset(slot.name for slot in _asked(data) if not slot.optional)


def _asked(data: DataSection) -> list[Slot]:
    if data.prompt is not None:
        return slots(data.prompt)
    if data.chat is not None:
        return []
    found = slots(data.text or "")
    answer = answer_field(data.text or "")
    first = next(place for place, slot in enumerate(found) if slot.name == answer)
    return found[:first]


def asked_sources(data: DataSection) -> list[DataSection]:
    """The templates that can be asked, without repetition: those of sources that have no question come last."""
    found: list[DataSection] = []
    for source in data.sources:
        if source.data not in found:
            found.append(source.data)
    return sorted(found, key=lambda each: not each.has_prompt and not asked_fields(each))


def prompt_of(fields: Mapping[str, str | None], data: DataSection) -> tuple[Part, ...]:
    """The recipe's template, filled in up to the answer, as it was given in training.

    Of `text` the blanks before the answer are left out as well: the model learned them as the answer's beginning.

    Args:
        fields: of `asked_fields`; None for an optional one that is not there.
        data: the template.

    Raises:
        UsageError: the template has nothing before the answer.
    """
    if data.prompt is not None:
        return tuple(filled_in(data.prompt, fields, learned=False))
    template = data.text or ""
    answer, before = answer_field(template), list[Part]()
    for piece in laid_out(template, lambda name: name == answer or fields.get(name) is not None):
        if isinstance(piece, str):
            before.append(Part(text=piece, learned=False, control=True))
        elif piece.name == answer:
            break
        else:
            before.append(Part(text=fields[piece.name] or "", learned=False))
    while before and not before[-1].text.rstrip(" "):
        before.pop()
    if not any(part.text.strip() for part in before):
        raise UsageError(f"data.text of this run begins with {{{answer}}}, so no field makes a prompt; use --prompt")
    return (*before[:-1], replace(before[-1], text=before[-1].text.rstrip(" ")))


def fields_given(words: Sequence[str], data: DataSection) -> dict[str, str | None]:
    """The fields of one record from `name=value`; of one name the last holds, and an optional one may be left out.

    Raises:
        UsageError: a field that the prompt does not have, or one is missing.
    """
    wanted = asked_fields(data)
    has = f"the prompt of this run is made of {', '.join(wanted) or 'no field'}"
    required = required_fields(data)
    fields: dict[str, str | None] = {name: None for name in wanted if name not in required}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--field {word}: write name=value; {has}")
        if name.strip() not in wanted:
            raise UsageError(f"--field {name}: {has}{did_you_mean(name.strip(), wanted)}")
        is_there = name.strip() in required or value.strip()
        fields[name.strip()] = typed(value) if is_there else None
    missing = [name for name in wanted if name not in fields]
    if missing:
        raise UsageError(f"--field: {has}; give {', '.join(missing)} as well")
    return fields
