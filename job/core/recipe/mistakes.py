"""What is wrong with a value of the recipe, in YAML's words: the schema library says it in Python's."""

import re
from collections.abc import Iterator, Sequence
from typing import get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from job.core.close_names import closest, did_you_mean
from job.core.recipe.schema import Recipe

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
OTHER_WORDS = {
    "lr": "train.learning_rate",
    "rank": "lora.r",
    "target_modules": "lora.targets",
    "max_seq_length": "data.max_length",
    "per_device_train_batch_size": "train.batch_size",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "lr_scheduler_type": "train.schedule",
    "optim": "train.optimizer",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "evaluate.every_steps",
    "report_to": "track.trackers",
    "output_dir": "output",
}
"""What other trainers call a key."""


def reason(detail: ErrorDetails) -> str:
    """Why a value is refused."""
    kind, message = detail["type"], detail["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{_SAID[kind]}{_key_meant(keys_of(detail))}"
    if kind in _SAID:
        return _SAID[kind]
    if kind == "value_error":
        return message
    wanted = _WANTED.get(kind, f"{message[0].lower()}{message[1:]}")
    hint = "; put quotes around text that begins with a brace" if _is_bare_brace(detail) else ""
    return f"{wanted} (it is {shown(detail['input'])}{hint}{_choice_meant(detail)})"


def keys_of(detail: ErrorDetails) -> list[str | int]:
    """Where the mistake is: keys and places in lists, without the names that tell forms of a value apart."""
    return [part for part in detail["loc"] if not (isinstance(part, str) and part.startswith("<"))]


def known_keys(section: type[BaseModel] = Recipe, above: str = "") -> Iterator[str]:
    """Every key of the recipe by its path, sections included."""
    for name, field in section.model_fields.items():
        yield f"{above}{name}"
        for inner in _sections(field.annotation):
            yield from known_keys(inner, f"{above}{name}.")


def _sections(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _key_meant(keys: Sequence[str | int]) -> str:
    """One of the same section that looks like it, else what others call so, else one of another section."""
    *above, name = map(str, keys)
    section, known = ".".join(above), list(known_keys())
    if name in OTHER_WORDS:
        return f"; did you mean {OTHER_WORDS[name]}?"
    here = closest(name, [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section])
    if here is not None:
        return f"; did you mean {'.'.join([*above, here])}?"
    anywhere = closest(name, [key.rpartition(".")[2] for key in known])
    meant = [key for key in known if key.rpartition(".")[2] == anywhere]
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def _choice_meant(detail: ErrorDetails) -> str:
    if detail["type"] != "literal_error" or not isinstance(detail["input"], str):
        return ""
    return did_you_mean(detail["input"], re.findall(r"'([^']+)'", detail["ctx"]["expected"]))


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
