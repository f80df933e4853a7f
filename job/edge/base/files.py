"""Which files make a base model, and what refuses one before it costs anything: never a pickle, never its own code."""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import yaml

from job.core.base import quantisation
from job.core.base.quantisation import FourBits, Mxfp4
from job.core.errors import DataError, NotFoundError, UsageError

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DOCUMENTS = ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_TOKENIZER = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "merges.txt")
_SMALL = ("*.json", "*.jinja", *_TOKENIZER, *_DOCUMENTS)
_CHAT_TEMPLATES = "additional_chat_templates"
_CARD_CHARACTERS = 1 << 16
"""Of a model's card: front matter is shorter, and what follows it is not read."""
_DEEPEST_CARD = 20
_MOST_LICENCES, _LONGEST_LICENCE = 8, 200
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_GGUF = ("*.gguf", "*.GGUF")
_LONGEST_HEADER_BYTES = 2**24
"""A tensor takes a hundred bytes of it; the format itself would allow six times as many."""
_MOST_BYTES = (((_CONFIG,), 2**20), (_TOKENIZER, 2**27), (("*.json", "*.jinja"), 2**25))
"""Of the small files by kind, the first that matches: several times the largest that are published."""
_MOST_DOCUMENT_BYTES = 2**20
"""Of a card or a licence; the longest licences have a tenth of it."""
_LARGEST = MappingProxyType(
    {
        **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 1000),
        **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 2**17),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "n_inner"), 2**20),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "head_dim"), 2**13),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2**13),
        "vocab_size": 2**23,
        "max_position_embeddings": 2**30,
    }
)
"""Numbers of a config that memory or time follow as soon as a library reads it; ten times those of the largest models.
"""


def _matches(name: str, patterns: Collection[str]) -> bool:
    # Hidden names are other programs' business, and the marks of a copy.
    return not name.startswith(".") and any(fnmatchcase(name, pattern) for pattern in patterns)


def small_files(names: Collection[str]) -> list[str]:
    """Configuration, tokenizer, card and licence: what is read before the weights.

    Only the top folder counts: below it stand other formats of the same weights. Code and pickles are never among them.
    """
    return sorted(
        name
        for name in names
        if ("/" not in name and _matches(name, _SMALL))
        or (str(PurePosixPath(name).parent) == _CHAT_TEMPLATES and name.endswith(".jinja"))
    )


def identifying_files(names: Collection[str]) -> list[str]:
    """What can change the model: all but its documents."""
    weights = (name for name in names if "/" not in name and name.endswith(".safetensors"))
    return sorted([name for name in small_files(names) if not _matches(name, _DOCUMENTS)] + list(weights))


def refuse_unusable(names: Collection[str], *, source: str, complete: bool) -> None:
    """Look at the names alone.

    Args:
        names: of the model's files.
        source: what the recipe calls it.
        complete: whether there must be weights.

    Raises:
        NotFoundError: no config.json, or no weights at all.
        UsageError: the weights exist as pickles only, or as GGUF.
    """
    if _SINGLE not in names and _INDEX not in names and any(_matches(name, _GGUF) for name in names):
        raise quantisation.foreign("GGUF", source=source, named=())
    if _CONFIG not in names:
        raise NotFoundError(f"{source}: no {_CONFIG}; correct model.base: it must name a transformers model")
    if _SINGLE in names or _INDEX in names:
        return
    pickles = sorted(name for name in names if "/" not in name and _matches(name, _PICKLES))
    if pickles:
        raise UsageError(
            f"{source}: the weights are pickles only ({pickles[0]}), and a pickle can run any code when it is read; "
            "convert them to safetensors (load once in a sandbox, then save_pretrained) or choose another model.base"
        )
    if complete:
        raise NotFoundError(f"{source}: neither {_SINGLE} nor {_INDEX}; correct model.base")


def wanted_files(sizes: Mapping[str, int]) -> dict[str, int]:
    """The small files that are brought: a card or licence of megabytes is left where it is, for nothing depends on it.

    Args:
        sizes: name -> bytes.
    """
    large = {name for name, size in sizes.items() if size > _MOST_DOCUMENT_BYTES and _matches(name, _DOCUMENTS)}
    return {name: sizes[name] for name in small_files(sizes) if name not in large}


def refuse_large(sizes: Mapping[str, int], *, source: str) -> None:
    """Look at the small files' sizes: they are read into memory as a whole.

    Args:
        sizes: name -> bytes.
        source: what the recipe calls the model.

    Raises:
        DataError: one is larger than any of its kind.
    """
    for name in small_files(sizes):
        most = next((most for kind, most in _MOST_BYTES if _matches(name, kind)), None)
        if most is not None and sizes[name] > most:
            raise DataError(
                f"{source}: {name} has {sizes[name]:,} bytes, and such a file no more than {most:,}; copy the model "
                "again, or choose another model.base"
            )


def weight_files(folder: Path, names: Collection[str], *, source: str) -> list[str]:
    """The safetensors files that the loader will open, from a folder that has the small files.

    Raises:
        NotFoundError: the index names a file that does not exist.
        DataError: the index is broken.
    """
    if _SINGLE in names:
        return [_SINGLE]
    shards = _index_shards(_read_json(folder / _INDEX, source=source), source=source)
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise NotFoundError(
            f"{source}: {_INDEX} names {len(shards)} files, {len(missing)} of them missing, {missing[0]} first; "
            "complete the copy or correct model.base"
        )
    return shards


def _index_shards(index: dict[str, Any], *, source: str) -> list[str]:
    weight_map = index.get("weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
    # A name with a path in it could point anywhere on this machine.
    if not shards or any("/" in shard or "\\" in shard or not shard.endswith(".safetensors") for shard in shards):
        raise DataError(f"{source}: {_INDEX} has no usable weight_map; copy the model again")
    return shards


def refuse_unknown_architecture(folder: Path, *, source: str) -> None:
    """Look at config.json.

    Raises:
        UsageError: only code from the model's own repository, or no code at all, could build it.
        DataError: the file is broken, or describes a model larger than any.
    """
    config = _read_json(folder / _CONFIG, source=source)
    for name, value in _numbers(config):
        if value > _LARGEST.get(name, value):
            raise DataError(
                f"{source}: {_CONFIG}: {name} is {value:,}, and no model has more than {_LARGEST[name]:,}; "
                "copy the model again, or choose another model.base"
            )
    model_type = config.get("model_type")
    if _is_known(model_type):
        return
    if "auto_map" in config:
        raise UsageError(
            f"{source}: model type {model_type!r} needs code from its own repository (auto_map in {_CONFIG}), and this "
            "job never runs downloaded code; choose a model.base whose type transformers itself knows"
        )
    raise UsageError(
        f"{source}: model type {model_type!r} is unknown to the installed transformers; correct model.base"
    )


def four_bits(folder: Path, *, source: str) -> FourBits | Mxfp4 | None:
    """The 4 bits in which a base is published, by its config.json; None: it is not quantised.

    Raises:
        UsageError: it is quantised in another way.
        DataError: the file is broken.
    """
    config = _read_json(folder / _CONFIG, source=source)
    named = _front_matter(folder / "README.md").get("base_model")
    names = [*(named if isinstance(named, list) else [named]), config.get("_name_or_path")]
    return quantisation.four_bits_of(config, source=source, named=[n for n in names if isinstance(n, str)])


def _is_known(model_type: object) -> bool:
    """Whether transformers has code of its own for it."""
    from transformers.models.auto import auto_mappings

    if not isinstance(model_type, str):
        return False
    if model_type in auto_mappings.CONFIG_MAPPING_NAMES:
        return True
    # A few more stand where torch is loaded as well.
    from transformers.models.auto import configuration_auto

    return model_type in configuration_auto.CONFIG_MAPPING_NAMES


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number with its name, those of the models inside this one too."""
    inside = [config]
    while inside:
        for name, value in inside.pop().items():
            if isinstance(value, dict):
                inside.append(value)
            elif isinstance(value, int | float):
                yield name, value


def refuse_broken_weights(folder: Path, names: Collection[str], *, source: str) -> None:
    """Look at the header of each safetensors file and compare it with the file's size: no tensor is read.

    Raises:
        DataError: a file is cut short or is no safetensors file.
    """
    for name in names:
        problem = _header_problem(folder / name)
        if problem is not None:
            raise DataError(f"{source}: {folder / name}: {problem}; delete the file, then fetch the model again")


def _header_problem(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_LONGEST_HEADER_BYTES, size - 8):  # noqa: PLR2004 the length field, `{}`
            return "no safetensors header"
        try:
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            return f"nonsense in the safetensors header ({type(error).__name__})"
    expected = 8 + length + max(ends, default=0)
    return None if expected == size else f"{size:,} bytes, but its header describes {expected:,}"


def is_complete(folder: Path, *, source: str) -> bool:
    """Whether a folder has all that training needs; the weights come last, so nothing else is missing when they stand.

    Raises:
        DataError: the index is broken.
    """
    names = present_files(folder)
    if _CONFIG not in names or not any(_matches(name, _TOKENIZER) for name in names):
        return False
    if _SINGLE not in names and _INDEX not in names:
        return False
    try:
        weight_files(folder, names, source=source)
    except NotFoundError:
        return False
    return True


def present_files(folder: Path) -> dict[str, int]:
    """Name -> bytes of the files that count, names relative to the folder, with forward slashes."""
    found = {}
    for place in (folder, folder / _CHAT_TEMPLATES):
        if place.is_dir():
            with os.scandir(place) as entries:
                files = [Path(entry.path) for entry in entries if entry.is_file()]
            found.update({path.relative_to(folder).as_posix(): path.stat().st_size for path in files})
    return found


def licence(folder: Path) -> str | None:
    """What the model's card says, or the name of its licence file; None when there is neither."""
    front = _front_matter(folder / "README.md")
    named = front.get("license")
    if named == "other":
        named = front.get("license_name") or named
    words = [each for each in (named if isinstance(named, list) else [named]) if isinstance(each, str) and each]
    if words:
        return ", ".join(words[:_MOST_LICENCES])[:_LONGEST_LICENCE]
    files = [name for name in sorted(present_files(folder)) if _matches(name, ("LICENSE*", "LICENCE*"))]
    return f"see {files[0]}" if files else None


def _front_matter(card: Path) -> dict[str, Any]:
    """A card is prose by strangers: what cannot be read of it is empty."""
    if not card.is_file():
        return {}
    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_CARD_CHARACTERS)
    matter = text.split("\n---", 1)[0].removeprefix("---") if text.startswith("---") else ""
    try:
        if not _is_flat(matter):
            return {}
        front = yaml.safe_load(matter)
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that does not exist is a ValueError
        return {}
    return front if isinstance(front, dict) else {}


def _is_flat(matter: str) -> bool:
    """Whether nothing is repeated by name, which makes gigabytes of a few lines, or nested for hours of reading.

    It stops reading where that shows.
    """
    depth = 0
    for event in yaml.parse(matter):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST_CARD:
            return False
    return True


def _read_json(path: Path, *, source: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: {path.name} is not JSON ({error}); copy the model again") from error
    if not isinstance(value, dict):
        raise DataError(f"{source}: {path.name} holds no JSON object; copy the model again")
    return value
