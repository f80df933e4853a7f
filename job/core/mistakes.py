"""What is wrong with a value of the recipe, in YAML's words: the schema library says it in Python's."""

from pydantic_core import ErrorDetails

_SAID = {"extra_forbidden": "unknown key", "missing": "missing", "too_short": "the list is empty"}
_WANTED = {
    "model_type": "input should be a section of keys and values",
    "tuple_type": "input should be a list",
    "string_type": "input should be text",
    "int_type": "input should be a whole number",
    "int_from_float": "input should be a whole number",
    "float_type": "input should be a number",
    "bool_type": "input should be true or false",
}


def reason(detail: ErrorDetails) -> str:
    """Why a value is refused."""
    kind, message = detail["type"], detail["msg"].removeprefix("Value error, ")
    if kind in _SAID:
        return _SAID[kind]
    if kind == "value_error":
        return message
    wanted = _WANTED.get(kind, f"{message[0].lower()}{message[1:]}")
    hint = "; put quotes around text that begins with a brace" if _is_bare_brace(detail) else ""
    return f"{wanted} (it is {shown(detail['input'])}{hint})"


def shown(value: object) -> str:
    """A value as a person wrote it, or what kind of thing it is."""
    match value:
        case None:
            return "empty"
        case bool():
            return str(value).lower()
        case dict():
            return "a section of keys and values"
        case list() | tuple():
            return "a list"
        case _:
            return repr(value)


def _is_bare_brace(detail: ErrorDetails) -> bool:
    # {field} without quotes is a section with one key.
    return detail["type"] == "string_type" and isinstance(detail["input"], dict)
