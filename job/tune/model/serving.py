"""What a server needs beside an adapter to answer as it was taught: files that differ from the base's own."""

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from job.core.data_section import DataSection
from job.tune.data.chat import asked_rules
from job.tune.data.control import control_tokens
from job.tune.model.tokenizer import base_file, generation_stops

GENERATION_CONFIG = "generation_config.json"


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
    rules = asked_rules(tokenizer, data)
    if rules is not None and not rules.of_base and rules.template != tokenizer.chat_template:
        taught = copy.deepcopy(tokenizer)
        taught.chat_template = rules.template
        taught.save_pretrained(folder)
    stops = generation_stops(base) or _stops_of_config(base) or [tokenizer.eos_token_id]
    # A template that marks no end of a turn ends it with any word, which is nothing to stop at.
    taught_ends = {token.id for token in control_tokens(tokenizer)} & set(ends)
    if not taught_ends <= set(stops):
        settings = base_file(base, GENERATION_CONFIG) | {"eos_token_id": sorted({*stops, *taught_ends})}
        (folder / GENERATION_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sorted({path.name for path in folder.iterdir()} - before)


def _stops_of_config(base: Path) -> list[int]:
    """Where a base stops that has no settings of its own for generation."""
    config = base_file(base, "config.json")
    text = config.get("text_config")
    stops = config.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
    return [each for each in (stops if isinstance(stops, list) else [stops]) if isinstance(each, int)]
