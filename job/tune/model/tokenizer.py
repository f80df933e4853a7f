"""A base's tokenizer and positions as its own files name them, without loading torch: what `check` counts with first.

transformers' AutoTokenizer chooses a class by the base's config, and configs load torch. Of nearly every base the class
that its files name is the one that is chosen; whether it is, `encodes_alike` says once torch is there.
"""

import json
import re
from pathlib import Path
from typing import Any

_CLASS = re.compile(r"\w+Tokenizer(?:Fast)?|TokenizersBackend")
_BYTES_NOT_FOR = "LlamaTokenizer"
"""It makes a pre-tokenizer of its own; a base whose tokenizer.json has one on bytes gets another class."""


def named_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of the class that the base's files name; None: they name none, or it cannot be loaded so."""
    import transformers

    settings, file = _object(folder / "tokenizer_config.json"), folder / "tokenizer.json"
    name = settings.get("tokenizer_class")
    if not isinstance(name, str) or not _CLASS.fullmatch(name) or "auto_map" in settings or not file.is_file():
        return None
    if name.removesuffix("Fast") == _BYTES_NOT_FOR and "ByteLevel" in file.read_text(encoding="utf-8"):
        return None
    found: Any = getattr(transformers, name, None) or getattr(transformers, name.removesuffix("Fast"), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerFast)):
        return None
    try:
        return found.from_pretrained(folder)
    except Exception:  # noqa: BLE001 - whatever is wrong with its files, loading them as training does says it
        return None


def named_positions(folder: Path) -> int | None:
    """How many positions the base's config names; None: it names none."""
    config = _object(folder / "config.json")
    text = config.get("text_config")
    positions = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return positions if isinstance(positions, int) and not isinstance(positions, bool) and positions > 0 else None


def encodes_alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers are the same: class, rules and special tokens."""
    return (
        type(one) is type(other)
        and one.special_tokens_map == other.special_tokens_map
        and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    )


def _object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
