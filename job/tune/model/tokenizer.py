"""A base's tokenizer and positions as its own files name them, without loading torch: what `check` counts with first.

transformers' AutoTokenizer chooses a class by the base's config, and configs load torch. Of nearly every base the class
that its files name is the one that is chosen; whether it is, `encodes_alike` says once torch is there.
"""

import json
import re
from pathlib import Path
from typing import Any

_CLASS = re.compile(r"(?P<family>[A-Za-z]+)\d*Tokenizer(?:Fast)?|TokenizersBackend")
_OF_NO_FAMILY = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
_LLAMA = "llama"
"""Bases of this type use the class that they name, whatever it is; ..."""
_BYTES_NOT_FOR = "LlamaTokenizer"
"""... but this one, which makes a pre-tokenizer of its own, is not used where tokenizer.json has one on bytes."""


def named_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of the class that the base's files name; None: training may take another one, or it is broken."""
    import transformers

    name = _class_named(folder)
    found = name and (getattr(transformers, name, None) or getattr(transformers, name.removesuffix("Fast"), None))
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerFast)):
        return None
    tokenizer_class: Any = found
    try:
        return tokenizer_class.from_pretrained(folder)
    except Exception:  # noqa: BLE001 - whatever is wrong with its files, loading them as training does says it
        return None


def _class_named(folder: Path) -> str | None:
    settings, file = base_file(folder, "tokenizer_config.json"), folder / "tokenizer.json"
    name, model_type = settings.get("tokenizer_class"), base_file(folder, "config.json").get("model_type")
    match = _CLASS.fullmatch(name) if isinstance(name, str) else None
    if match is None or not isinstance(model_type, str) or "auto_map" in settings or not file.is_file():
        return None
    own = model_type == _LLAMA or model_type.startswith((match["family"] or "").lower())
    if not (own or match[0] in _OF_NO_FAMILY):
        return None
    if match[0].removesuffix("Fast") == _BYTES_NOT_FOR and "ByteLevel" in file.read_text(encoding="utf-8"):
        return None
    return match[0]


def named_positions(folder: Path) -> int | None:
    """How many positions the base's config names; None: it names none."""
    return _size(folder, "max_position_embeddings")


def named_rows(folder: Path) -> int | None:
    """How many rows of embeddings the base's config names; None: it names none."""
    return _size(folder, "vocab_size")


def _size(folder: Path, name: str) -> int | None:
    config = base_file(folder, "config.json")
    text = config.get("text_config")
    size = (text if isinstance(text, dict) else config).get(name)
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def generation_stops(folder: Path) -> list[int]:
    """The tokens at which the base's generation_config ends an answer; empty: it names none."""
    stops = base_file(folder, "generation_config.json").get("eos_token_id")
    return [each for each in (stops if isinstance(stops, list) else [stops]) if isinstance(each, int)]


def encodes_alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers are the same: class, rules and special tokens."""
    return (
        type(one) is type(other)
        and one.special_tokens_map == other.special_tokens_map
        and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    )


def base_file(folder: Path, name: str) -> dict[str, Any]:
    """The object in one of a base's JSON files; empty where there is none."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
