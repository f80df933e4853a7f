"""By what a model is asked and stops as it was taught: template, stops, and files of them beside an adapter."""

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from job.core.base.servers import GENERIC_TOKENIZER, readable_settings
from job.core.recipe.data_section import DataSection
from job.tune.data.chats.chat import asked_rules
from job.tune.data.control import control_tokens
from job.tune.model.tokenizer import base_file, generation_stops

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"


def write_serving_files(
    folder: Path, base: Path, tokenizer: Any, data: DataSection, *, ends: Collection[int]
) -> list[str]:
    """Write the tokenizer with the recipe's chat template, and settings that stop where the examples end.

    A base whose own template taught, and whose settings stop there already, is served with its own files.

    Args:
        folder: the adapter's.
        base: the base's folder.
        tokenizer: the base's.
        data: the recipe's section.
        ends: the tokens that the examples end with.

    Returns:
        The names of the files.
    """
    before = {path.name for path in folder.iterdir()}
    template = taught_template(tokenizer, data)
    if template is not None:
        taught = copy.deepcopy(tokenizer)
        taught.chat_template = template
        taught.save_pretrained(folder)
        _make_generic(folder / TOKENIZER_CONFIG, taught)
    stops = taught_stops(base, tokenizer, ends=ends)
    if set(stops) != set(_stops_of(base, tokenizer)):
        settings = base_file(base, GENERATION_CONFIG) | {"eos_token_id": stops}
        (folder / GENERATION_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sorted({path.name for path in folder.iterdir()} - before)


def _make_generic(path: Path, tokenizer: Any) -> None:
    """Name the class that reads tokenizer.json as it stands, in transformers 4 too: many servers run on it."""
    settings = readable_settings(base_file(path.parent, path.name)) | {
        "tokenizer_class": GENERIC_TOKENIZER,
        "model_input_names": [*tokenizer.model_input_names],  # that class would have others
    }
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def taught_template(tokenizer: Any, data: DataSection) -> str | None:
    """The chat template that taught; None: that is the base's own, or there were no chats."""
    rules = asked_rules(tokenizer, data)
    if rules is None or rules.of_base or rules.template == tokenizer.chat_template:
        return None
    return rules.template


def taught_stops(base: Path, tokenizer: Any, *, ends: Collection[int]) -> list[int]:
    """The tokens at which an answer ends: where the base stops, and before them what examples end with besides.

    Args:
        base: its folder.
        tokenizer: the base's.
        ends: the tokens that the examples end with.
    """
    stops = _stops_of(base, tokenizer)
    # A template that marks no end of a turn ends it with any word, which is nothing to stop at.
    taught = {token.id for token in control_tokens(tokenizer)} & set(ends)
    return [*sorted(taught - set(stops)), *stops]


def _stops_of(base: Path, tokenizer: Any) -> list[int]:
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return generation_stops(base) or _stops_of_config(base) or own


def _stops_of_config(base: Path) -> list[int]:
    """Where a base stops that has no settings of its own for generation."""
    config = base_file(base, "config.json")
    text = config.get("text_config")
    stops = config.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
    return [each for each in (stops if isinstance(stops, list) else [stops]) if isinstance(each, int)]
