"""A base's config made small: a layer of each kind, few heads, short windows; what its code does is what it did."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from job.tune.model.config import empty_model, largest

VOCABULARY = 512
WINDOW = 16
"""Tokens that a window or a chunk sees."""
ORIGINAL = 32
"""Positions that a stretched rotation was trained with."""
POSITIONS = 128
_LAYERS = 8
"""At most so many, where fewer do not show every kind."""
_BLOCK = 64
"""Weights that share a scale in 4 bits."""
_EXPERTS = 4
_HEADS = ("num_attention_heads", "n_head", "n_heads", "attention_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_WINDOWS: tuple[str, ...] = (
    "sliding_window",
    "attention_window_size",
    "window_size",
    "attention_chunk_size",
    "floor_scale",
    "chunk_size",
)
_WINDOWS += ("mamba_chunk_size", "block_size", "keep_window_size")
_MOST_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_EXPERT_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
_LAYER_NUMBERS = ("moe_layers", "full_attn_idxs", "attn_layer_indices", "mlp_only_layers")
"""Lists of layers by their number."""
_OF_A_LAYER = re.compile(r"idx|index|layer_id|number")
_DROPPED = ("quantization_config", "auto_map", "transformers_version", "architectures")
_TWICE_AS_WIDE = "attention_hidden_size"
"""What Zamba2 calls the width of its attention; like others it follows from the hidden size, where it is not named."""
_FOLLOWING = (
    *(_TWICE_AS_WIDE, "attention_head_dim", "mamba_headdim", "kv_channels", "num_query_groups", "hybrid_layer_ids"),
)


def shrunk(config: Any, *, heads: int) -> Any:
    """The same family with every kind of layer and every limit on tokens, small enough for seconds on a CPU.

    Args:
        config: of a decoder.
        heads: to keep of those of a layer.

    Raises:
        Exception: transformers' own, where the small sizes do not go together; of any kind.
    """
    total = config.num_hidden_layers
    narrow = {**_narrow(config, heads), "num_hidden_layers": total}
    kinds = _pattern(_kinds(type(config).from_dict(narrow)))
    for chosen in _choices(kinds):
        small = type(config).from_dict(_with_layers(narrow, chosen, total))
        if _pattern(_kinds(small)) == _pattern([kinds[number] for number in chosen]):
            break
    return small


def _choices(kinds: Sequence[int]) -> Iterable[list[int]]:
    """Numbers of the layers to take: the first of each kind, else from the first on until all kinds are there."""
    first, most = sorted({kinds.index(kind) for kind in kinds}), min(_LAYERS, len(kinds))
    if 1 < len(first) <= most:
        yield first
    needed = max(2, 1 + kinds.index(max(kinds)))
    if needed <= most:
        yield [*range(needed)]
    yield [*range(most)]


def _kinds(config: Any) -> list[Any]:
    """What tells the layers apart: their modules, and what these hold of whole numbers, switches and words."""
    layers = next(
        module
        for module in empty_model(config).modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    )
    return [[_kind(name, module) for name, module in layer.named_modules()] for layer in layers]


def _kind(name: str, module: nn.Module) -> Any:
    held = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | str) and not _OF_A_LAYER.search(key)
    }
    return name, type(module).__name__, held


def _pattern(kinds: Sequence[Any]) -> list[int]:
    """Each kind as the number of those before it that were new."""
    seen: list[Any] = []
    for kind in kinds:
        if kind not in seen:
            seen.append(kind)
    return [seen.index(kind) for kind in kinds]


def fewest_heads(config: Any) -> int:
    """So many that a token is some blocks of 4 bits wide."""
    width = _width(config)
    return next((n for n in (2, 4, 8, 16, 32) if n * width % _BLOCK == 0 and n * width >= 2 * _BLOCK), 4)


def _width(config: Any) -> int:
    width = None if hasattr(config, _TWICE_AS_WIDE) else largest(config, "head_dim")
    return int(width or config.hidden_size // config.num_attention_heads)


def _narrow(config: Any, few: int) -> dict[str, Any]:
    values = {key: value for key, value in config.to_dict().items() if key not in _DROPPED}
    if _TWICE_AS_WIDE in values:
        values = {key: value for key, value in values.items() if key not in _FOLLOWING}
    hidden, heads = config.hidden_size, config.num_attention_heads
    key_heads, width = largest(config, "num_key_value_heads") or heads, _width(config)
    new_hidden = few * width
    sizes: dict[str, Any] = {
        **dict.fromkeys(_HEADS, few),
        **dict.fromkeys(_KEY_HEADS, few if key_heads == heads else min(key_heads, few // 2)),
        **dict.fromkeys(_EXPERT_NUMBERS, _EXPERTS),
        **dict.fromkeys(_CHOSEN, 2),
        **dict.fromkeys(_WINDOWS, WINDOW),
        **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
        **dict.fromkeys(("n_group", "topk_group"), 2),
        **_states(values, hidden, new_hidden),
    }
    given = dict.fromkeys(_KEY_HEADS, sizes["num_key_value_heads"]) | {"head_dim": width}
    for name, value in values.items():
        if value is None and name in given:
            values[name] = given[name]
        elif name in sizes:
            values[name] = _least(value, sizes[name])
        elif value == hidden and isinstance(value, int):
            values[name] = new_hidden
        elif name.startswith(("intermediate_size", "ffn_", "n_inner", "moe_", "shared_")) and name.endswith(_WIDTHS):
            values[name] = _least(value, 2 * new_hidden)
        elif name.endswith("_token_id"):
            values[name] = _small_token(name, value)
    if "rope_parameters" in values:
        values["rope_parameters"] = _short_rotation(values["rope_parameters"])
    return values | _positions(values) | {"initializer_range": 1.6 * new_hidden**-0.5, "dtype": "float32"}


_WIDTHS = ("size", "size_mlp", "dim", "inner")


def _states(values: Mapping[str, Any], hidden: int, new_hidden: int) -> dict[str, Any]:
    """Heads of recurrent layers, as many as fit the new width."""
    sizes: dict[str, Any] = dict.fromkeys(("n_groups", "mamba_n_groups"), 1)
    keys, of_values = values.get("linear_num_key_heads"), values.get("linear_num_value_heads")
    if keys and of_values:
        sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2 * of_values // keys}
    for number, width in (
        ("mamba_n_heads", "mamba_d_head"),
        ("mamba_num_heads", "mamba_head_dim"),
        ("num_heads", "head_dim"),
    ):
        if isinstance(values.get(number), int) and isinstance(values.get(width), int):
            inner = values[number] * values[width]
            sizes[number] = max(1, inner * new_hidden // hidden // values[width])
            sizes["mamba_d_ssm"] = sizes[number] * values[width]
    return sizes


def _least(value: Any, size: Any) -> Any:
    if isinstance(value, bool) or not value:
        return value
    return [min(each, size) for each in value] if isinstance(value, list | tuple) else min(value, size)


def _small_token(name: str, value: Any) -> Any:
    if value is None:
        return None
    return {"pad_token_id": 0, "bos_token_id": 1}.get(name, 2)


def _short_rotation(rope: Any) -> Any:
    if not isinstance(rope, dict):
        return rope
    return {
        name: _short_rotation(value)
        if isinstance(value, dict)
        else ORIGINAL
        if name == "original_max_position_embeddings" and value
        else value
        for name, value in rope.items()
    }


def _positions(values: Mapping[str, Any]) -> dict[str, Any]:
    """Positions as many times the original ones as they were."""
    rope = values.get("rope_parameters") or {}
    stretched, most = rope.get("factor") or 1.0, POSITIONS
    original = values.get("original_max_position_embeddings")
    if original:
        stretched = max(1.0, values["max_position_embeddings"] / original)
        most = round(ORIGINAL * stretched)
    elif rope.get("rope_type") == "dynamic":
        most = ORIGINAL
    elif rope.get("original_max_position_embeddings"):
        most = round(ORIGINAL * stretched)
    found: dict[str, Any] = {name: most for name in _MOST_POSITIONS if values.get(name)}
    return found | ({"original_max_position_embeddings": ORIGINAL} if original else {})


def _with_layers(values: Mapping[str, Any], chosen: Sequence[int], total: int) -> dict[str, Any]:
    """These layers only, in lists with an entry for each layer as well."""
    found = dict(values)
    for name, value in values.items():
        if name in _LAYER_NUMBERS and isinstance(value, list):
            found[name] = [chosen.index(number) for number in value if number in chosen]
        elif isinstance(value, list) and len(value) == total:
            found[name] = [value[number] for number in chosen]
    if isinstance(values.get("per_layer_config"), dict):
        of_layers = {int(number): each for number, each in values["per_layer_config"].items()}
        found["per_layer_config"] = {at: of_layers[number] for at, number in enumerate(chosen) if number in of_layers}
    shared = values.get("num_kv_shared_layers")
    if shared:
        found["num_kv_shared_layers"] = sum(number >= total - shared for number in chosen)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in found:
            found[name] = len(chosen)
    return found
