"""YAML text and overrides -> Recipe; every mistake at once, each with its line."""

import re
from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from job.core.errors import UsageError
from job.core.given import Given
from job.core.recipe.mistakes import keys_of, reason, shown
from job.core.recipe.schema import Recipe
from job.core.section import Uri


def load_recipe(text: str, *, source: str, overrides: Sequence[Given] = ()) -> Recipe:
    """Read a recipe.

    Args:
        text: the YAML.
        source: the file's name, for messages.
        overrides: `section.key=value`, the value in YAML; later ones win.

    Raises:
        UsageError: with every mistake, its line and its path.
    """
    node, raw = _parse(text, source)
    for override in overrides:
        _override(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        mistakes = [_mistake(detail, node=node, source=source, overrides=overrides) for detail in error.errors()]
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        msg = "\n  ".join([f"{source}: {count} in the recipe (docs/recipe.md lists the keys)", *mistakes])
        raise UsageError(msg) from error


def named_output(text: str, overrides: Sequence[Given] = ()) -> str | None:
    """The output that a recipe names, also where the rest of it is wrong: so that this can be said there."""
    raw: dict[str, Any] = {}
    with suppress(UsageError):
        raw = _parse(text, "recipe")[1]
    if not raw and (line := re.search(r"^output:.*", text, re.MULTILINE)):  # no YAML as a whole
        with suppress(UsageError):
            raw = _parse(line.group(), "recipe")[1]
    for override in overrides:
        with suppress(UsageError):
            _override(raw, override)
    try:
        return TypeAdapter(Uri).validate_python(raw.get("output"))
    except ValidationError:
        return None


class _Loader(yaml.SafeLoader):
    """YAML's safe types; `2e-4` is a number, as YAML 1.2 has it, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        seen = set()
        for key_node, _value in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is plain text", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key "{key}" stands twice', key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse(text: str, source: str) -> tuple[yaml.Node | None, dict[str, Any]]:
    try:
        node = yaml.compose(text, Loader=_Loader)
        raw = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise UsageError(f"{where}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{source}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UsageError(
            f"{source}: a recipe has the sections model, data and train, and an output; this is {shown(raw)}"
        )
    return node, raw


def _override(raw: dict[str, Any], override: Given) -> None:
    path, equals, value = override.text.partition("=")
    told = f"{override.source} {override.text}"
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"{told}: write section.key=value, for example --set lora.r=16")
    place = raw
    for key in keys[:-1]:
        inner = place.setdefault(key, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{told}: {key} is {shown(inner)} in the recipe, not a section")
        place = inner
    try:
        place[keys[-1]] = yaml.load(value, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-13-45 looks like a date
        raise UsageError(f"{told}: the value is not valid YAML; quote it") from error


def _mistake(detail: ErrorDetails, *, node: yaml.Node | None, source: str, overrides: Sequence[Given]) -> str:
    keys = keys_of(detail)
    path = ".".join(str(key) for key in keys)
    sources = [override.source for override in overrides if _sets(override.key, path, detail["type"])]
    where = f"{sources[-1]} {path}" if sources else f"{source}:{_line(node, keys)}"
    message = reason(detail)
    return f"{where}: {path}: {message}" if path else f"{where}: {message}"


def _sets(key: str, path: str, mistake: str) -> bool:
    """Whether an override of `key` made the mistake at `path`: it gave that value, or the section around it."""
    return f"{path}.".startswith(f"{key}.") or (mistake == "extra_forbidden" and key.startswith(f"{path}."))


def _line(node: yaml.Node | None, keys: Iterable[str | int]) -> int:
    """Line (from 1) of the deepest part of the path that stands in the file."""
    line = node.start_mark.line if node else 0
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            pairs = [(k, v) for k, v in node.value if k.value == key]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            pairs = [(node.value[key], node.value[key])]
        else:
            break
        if not pairs:
            break
        line, node = pairs[-1][0].start_mark.line, pairs[-1][1]
    return line + 1
