"""Chat templates that a recipe names as files: their text stands in the recipe from then on, and so in the run."""

import re
from pathlib import Path
from typing import TypeVar

from job.core.errors import UsageError
from job.core.recipe.data_section import NAMED_TEMPLATES, HeldOutSource, Templates
from job.core.recipe.schema import Recipe

_MOST_BYTES = 2**20
_T = TypeVar("_T", bound=Templates)


def with_template_texts(recipe: Recipe, *, beside: Path) -> Recipe:
    """The recipe with each file that `chat_template` names replaced by what stands in it.

    Args:
        recipe: as it was written.
        beside: the folder of the recipe, from which a relative path counts.

    Raises:
        UsageError: there is no such file, or it is no template.
    """
    data = recipe.data
    read = {
        side: tuple(_read(each, beside) if isinstance(each, HeldOutSource) else each for each in listed)
        for side in ("train", "validation")
        if isinstance(listed := getattr(data, side), tuple)
    }
    return recipe.model_copy(update={"data": _read(data, beside).model_copy(update=read)})


def _read(templates: _T, beside: Path) -> _T:
    named = templates.chat_template
    if named is None or named in NAMED_TEMPLATES or _is_template(named):
        return templates
    return templates.model_copy(update={"chat_template": _text(beside / named)})


def _is_template(text: str) -> bool:
    return re.search(r"\{[{%]", text) is not None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"data.chat_template: {path}: cannot be read ({error}); name a file, seen from the recipe, or one of "
            f"{', '.join(NAMED_TEMPLATES)}"
        ) from error
    if len(content) > _MOST_BYTES:
        raise UsageError(f"data.chat_template: {path}: longer than {_MOST_BYTES:,} bytes; this is no chat template")
    if not _is_template(text):
        raise UsageError(f"data.chat_template: {path}: holds neither {{{{ nor {{%, so it is no Jinja template")
    return text
