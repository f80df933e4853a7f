"""Prompts for a tuned model, from what a person types and from the fields of a record."""

import re
from collections.abc import Mapping, Sequence
from string import Formatter

from job.core.close_names import did_you_mean
from job.core.data_section import DataSection, template_fields
from job.core.errors import UsageError


def typed(text: str) -> str:
    r"""What somebody means who types one line: `\n` is a line break, and `\\n` a backslash with an n."""
    return re.sub(r"(\\?)\\n", lambda found: r"\n" if found[1] else "\n", text)


def asked_fields(data: DataSection) -> tuple[str, ...]:
    """The fields that a prompt is made of: those of `prompt`; those of `text` but its last one, which is the answer."""
    if data.prompt is not None:
        return tuple(dict.fromkeys(template_fields(data.prompt)))
    *before, answer = template_fields(data.text or "")
    return tuple(dict.fromkeys(name for name in before if name != answer))


def prompt_of(fields: Mapping[str, str], data: DataSection) -> str:
    """The recipe's template, filled in up to the answer.

    Of `text` the blanks before the answer are left out as well: the model learned them as the answer's beginning.

    Raises:
        UsageError: the template has nothing before the answer.
    """
    if data.prompt is not None:
        return data.prompt.format_map(fields)
    template = data.text or ""
    answer, prompt = template_fields(template)[-1], ""
    for literal, name, _spec, _conversion in Formatter().parse(template):
        prompt += literal
        if name == answer:
            break
        prompt += fields[name] if name is not None else ""
    if not prompt.strip():
        raise UsageError(f"data.text of this run begins with {{{answer}}}, so no field makes a prompt; use --prompt")
    return prompt.rstrip(" ")


def fields_given(words: Sequence[str], data: DataSection) -> dict[str, str]:
    """The fields of one record from `name=value`; of one name the last holds.

    Raises:
        UsageError: a field that the prompt does not have, or one is missing.
    """
    wanted = asked_fields(data)
    has = f"the prompt of this run is made of {', '.join(wanted) or 'no field'}"
    fields = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--field {word}: write name=value; {has}")
        if name.strip() not in wanted:
            raise UsageError(f"--field {name}: {has}{did_you_mean(name.strip(), wanted)}")
        fields[name.strip()] = typed(value)
    missing = [name for name in wanted if name not in fields]
    if missing:
        raise UsageError(f"--field: {has}; give {', '.join(missing)} as well")
    return fields
