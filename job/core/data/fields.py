"""One record's bytes -> the fields that are named, as text, or the reason why they are not there."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from job.core.close_names import closest


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """Why a record, or a field of it, cannot be used."""

    reason: str
    blank: str | None = None
    """The field that is empty, where that is the reason."""
    absent: bool = False
    """Whether there is nothing, which is right where a field may be left out."""


class _Number(str):
    """A number as the record writes it: read and written again, 1.10 would be 1.1."""

    __slots__ = ()


class _Constant(str):
    """NaN, Infinity or -Infinity, which JSON does not have."""

    __slots__ = ()


_DECODER = json.JSONDecoder()
_AS_WRITTEN = json.JSONDecoder(parse_int=_Number, parse_float=_Number, parse_constant=_Constant)


def fields_of(
    raw: bytes, names: Iterable[str], *, required: Collection[str], strict_types: bool
) -> dict[str, str | None] | Unusable:
    """The named fields of one record, None for an optional one that is not there; or the reason against them.

    Args:
        raw: the record.
        names: of the fields; `outer.inner` is looked for inside an object, unless a field has that very name.
        required: those that must be there.
        strict_types: whether numbers and booleans are refused.
    """
    record = record_of(raw, _AS_WRITTEN)
    if isinstance(record, str):
        return Unusable(reason=record)
    fields: dict[str, str | None] = {}
    blank = None
    for name in names:
        found = _text_of(record, name, strict_types=strict_types)
        if isinstance(found, str):
            fields[name] = found
        elif found.absent and name not in required:
            fields[name] = None
        elif found.blank is None:
            return found
        else:
            blank = blank or found  # whatever else is wrong with the record comes first
    return fields if blank is None else blank


def value_of(raw: bytes, name: str) -> str | None:
    """One field of a record as text, whatever it holds: a list or an object as JSON; None: it is not there, or blank.

    Args:
        raw: a record that was read before.
        name: of the field; see `fields_of`.
    """
    record = record_of(raw, _AS_WRITTEN)
    if isinstance(record, str):
        return None
    value = _found(record, name, name)
    if isinstance(value, str):
        text = str(value)
    elif isinstance(value, Unusable) or value is None:
        return None
    else:  # its numbers as numbers again
        plain = record_of(raw)
        text = json.dumps(plain if isinstance(plain, str) else _found(plain, name, name), ensure_ascii=False)
    text = text.strip()
    return text.encode("utf-8", "replace").decode() or None


def record_of(raw: bytes, decoder: json.JSONDecoder = _DECODER) -> dict[str, Any] | str:
    """The JSON object of one line, or the reason why it is none."""
    if b"\0" in raw:
        return "holds a NUL byte"
    try:
        record = decoder.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line)"
    except RecursionError:
        return "nested too deeply"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg}, column {error.colno})"
    except ValueError:
        return "holds a number with too many digits"
    return record if isinstance(record, dict) else f"not a JSON object but {json_kind(record)}"


def _text_of(record: dict[str, Any], name: str, *, strict_types: bool) -> str | Unusable:
    """A field as text."""
    value = _found(record, name, name)
    if isinstance(value, Unusable):
        return value
    if isinstance(value, bool | _Number) and not strict_types:
        return str(value) if isinstance(value, _Number) else json.dumps(value)
    if isinstance(value, str) and not isinstance(value, _Number | _Constant):
        return _sound(value, name)
    kind = f"{value}, which JSON does not have" if isinstance(value, _Constant) else f"{json_kind(value)}, not a string"
    return Unusable(reason=f'"{name}" is {kind}{_chat_hint(name, value)}', absent=value is None)


def _chat_hint(name: str, value: object) -> str:
    is_chat = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    return f"; for a chat's messages write data.chat: {name}" if is_chat else ""


def _sound(value: str, name: str) -> str | Unusable:
    """A string that may stand in an example."""
    if not value.strip():
        return Unusable(reason=f'"{name}" is empty', blank=name, absent=True)
    if "\0" in value:
        return Unusable(reason=f'"{name}" holds a NUL character')
    if not _is_text(value):
        return Unusable(reason=f'"{name}" holds half a surrogate pair, which is no character')
    return value


def _found(record: dict[str, Any], name: str, whole: str) -> Any:
    """The value of a field, looked for inside of objects too."""
    if name in record:
        return record[name]
    outer, dot, inner = name.partition(".")
    if not dot or outer not in record:
        has = f"the record has {listed(record, name)}" if record else "the record is empty"
        return Unusable(reason=f'"{whole}" is missing ({has})', absent=True)
    value = record[outer]
    if isinstance(value, dict):
        return _found(value, inner, whole)
    is_nothing = value is None or (isinstance(value, str) and not value.strip())
    chat = _chat_hint(whole.removesuffix(f".{inner}"), value)
    reason = f'"{whole}" is missing ("{outer}" is {json_kind(value)}, not an object{chat})'
    return Unusable(reason=reason, absent=is_nothing)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def listed(record: Mapping[str, object], wanted: str, most: int = 6) -> str:
    """The record's names, and the one that looks like the name that was looked for."""
    names = {_as_json(name): name[:40] for name in list(record)[:most]}
    meant = closest(wanted, names.values())
    hint = "" if meant is None else f"; did you mean {_as_json(meant)}?"
    return ", ".join(names) + (", ..." if len(record) > most else "") + hint


def _as_json(name: str) -> str:
    # So that a line stays a line; half a surrogate pair could not be written into the report.
    return json.dumps(name[:40], ensure_ascii=not _is_text(name))


def json_kind(value: object) -> str:
    """What JSON calls it, with its article."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case _Number() | _Constant() | int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case _:
            return "an object"
