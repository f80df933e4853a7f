"""A base model's config and tokenizer: read without its code, and the sizes that the plan needs."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from job.core.errors import UsageError
from job.core.plan.memory import ExpertsShape, ModelShape
from job.kernels.ops import Gate
from job.tune.model.four_bit import put_into_four_bits
from job.tune.model.mixtures import experts_modules, gate_of, matrix_of_expert, weights_of_experts
from job.tune.model.recurrent import recurrent_shape
from job.tune.model.stored.tensor_files import stored_names
from job.tune.model.wrappers import Wrapper, text_config_of, wrapper_of

CONFIG = "config.json"
HEAD = "lm_head.weight"
ROTATIONS_BY_LENGTH = ("longrope", "dynamic")
"""Kinds of rotations that depend on how long a document is."""
_LIMITS = (
    *("sliding_window", "attention_chunk_size", "original_max_position_embeddings", "window_size"),
    *("attention_window_size", "floor_scale", "chunk_size", "mamba_chunk_size", "block_size", "keep_window_size"),
)
"""Where configs name such limits, at their top or in their `rope_parameters`."""
_MOST_TOKENS = 600
"""Of a document: longer ones would take a GPU that just holds the model its memory. Limits beyond are not reached."""
_BEYOND = 8
"""Tokens by which the longest document passes them."""


def read_config(folder: Path) -> Any:
    """The config of the base as it is trained: of a multimodal model, its text decoder's.

    Raises:
        UsageError: it needs code of its own, transformers does not know it, or its decoder is not trained.
    """
    whole = read_whole_config(folder)
    text = text_config_of(whole)
    if text is not whole and text.tie_word_embeddings:
        # Some say so by default alone; transformers goes by the files too.
        text.tie_word_embeddings = not any(name.endswith(HEAD) for name in stored_names(folder))
    return text


def read_whole_config(folder: Path) -> Any:
    """The config of the base as it is published.

    Raises:
        UsageError: it needs code of its own, or transformers does not know it.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(
            f"{folder}/config.json: not a model that transformers knows without running code from it ({error})"
        ) from error


def read_wrapper(folder: Path) -> Wrapper | None:
    """The multimodal model that a base is; None: it is a language model alone."""
    return wrapper_of(read_whole_config(folder))


def causal_lm_of(config: Any) -> Any:
    """The class of the causal language model that a config describes.

    Raises:
        UsageError: it describes none.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _no_causal_lm(config)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def empty_model(config: Any) -> Any:
    """The model that a config describes, on the meta device: names and sizes, no weights.

    Raises:
        UsageError: it describes no causal language model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise _no_causal_lm(config) from error


def _no_causal_lm(config: Any) -> UsageError:
    return UsageError(f"model.base: {config.model_type} is no causal language model; choose another base")


def tokens_beyond(config: Any) -> int:
    """Tokens of a document that is longer than every limit of a model that can be passed; 0: it has none."""
    ropes = [getattr(config, "rope_parameters", None) or {}]
    ropes += [rope for rope in ropes[0].values() if isinstance(rope, dict)]
    named = [getattr(config, name, None) for name in _LIMITS] + [rope.get(name) for rope in ropes for name in _LIMITS]
    if any(rope.get("rope_type") in ROTATIONS_BY_LENGTH for rope in ropes):
        named.append(getattr(config, "max_position_embeddings", None))
    passed = [limit + _BEYOND for limit in named if isinstance(limit, int) and limit + _BEYOND <= _MOST_TOKENS]
    return max(passed, default=0)


def shape_of(config: Any, left: Collection[str] | None = None) -> ModelShape:
    """Sizes of a decoder, counted on the model that its config describes: no weight is read.

    Args:
        config: of a decoder.
        left: linear modules that a base which comes in 4 bits has not in them; None: this job chooses them.

    Raises:
        UsageError: it describes no causal language model, or one without a size that the plan needs.
    """
    model = empty_model(config)
    sizes = {name: largest(config, name) for name in _SIZES}
    unknown = [name for name, size in sizes.items() if size is None]
    if unknown:
        raise UsageError(
            f"model.base: {config.model_type}: its config has no {', '.join(unknown)}; choose another base"
        )
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    width = largest(config, "head_dim") or hidden // heads
    softcap, scale = softcap_and_scale(config)
    recurrent = recurrent_shape(model, config)  # before its linear modules are others
    linear, experts = put_into_four_bits(model, left), _experts(config, model)
    in_linear = sum(module.in_features * module.out_features for module in linear.values())
    left_whole = _parameters(model) - sum(module.weight.numel() for module in linear.values())
    return ModelShape(
        layers=sizes["num_hidden_layers"],
        hidden=hidden,
        intermediate=_intermediate(config, linear.values()) or hidden,
        vocabulary=config.vocab_size,
        positions=largest(config, "max_position_embeddings") or largest(config, "max_seq_len") or UNBOUNDED_POSITIONS,
        heads=heads,
        key_heads=largest(config, "num_key_value_heads") or heads,
        head_width=width,
        linear_parameters=in_linear,
        whole_parameters=left_whole - (0 if experts is None else experts.parameters),
        logits="capped" if softcap is not None else "plain" if scale == 1 else "scaled",
        norms=max(2, _as_wide(model, hidden) // sizes["num_hidden_layers"]),
        head_norms=width != hidden and _as_wide(model, width) >= 2 * sizes["num_hidden_layers"],
        layer_whole_parameters=_whole_in_layers(model, sizes["num_hidden_layers"], linear.values()),
        experts=experts,
        recurrent=recurrent,
    )


def _experts(config: Any, model: Any) -> ExpertsShape | None:
    """Those that are put into 4 bits; where layers differ in them, the largest count."""
    found = dict(experts_modules(model))
    if not found:
        return None
    matrices = [
        (module.get_parameter(name), matrix_of_expert(module, module.get_parameter(name).shape))
        for module in found.values()
        for name in weights_of_experts(module)
    ]
    blocks = tuple(f"{path.rpartition('.')[0]}." for path in found)
    inputs = (getattr(m, "in_features", 0) for path, m in model.named_modules() if path.startswith(blocks))
    number = max(len(stack) for stack, _ in matrices)
    return ExpertsShape(
        parameters=sum(stack.numel() for stack, _ in matrices),
        sides=sum(len(stack) * sum(sides) for stack, sides in matrices),
        number=number,
        chosen=min(number, _chosen(config) or number),
        first=max(height for _, (height, _) in matrices[::2]),
        inner=max(width for _, (_, width) in matrices[1::2]),
        largest=max(stack.numel() for stack, _ in matrices),
        beside=max((width for width in inputs if width != config.hidden_size), default=0),
        has_bias=any(module.has_bias for module in found.values()),
        gate_in_one=all(isinstance(gate_of(module), Gate) for module in found.values()),
    )


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
UNBOUNDED_POSITIONS = 2048
"""Of a model that names none: BLOOM's and MPT's positions are distances, and they were trained with as many."""


def largest(config: Any, name: str) -> Any:
    """A size in a config; where layers differ in it (Gemma 4's heads), the largest; None: it has none."""
    layers = getattr(config, "per_layer_config", None)
    of_layers = [getattr(layer, name, None) for layer in layers] if layers else [_plain(config, name)]
    found = [value for value in of_layers if value is not None]
    return max(found) if found else _plain(config, name)


def _plain(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except ValueError:  # of a size that layers differ in
        return None


def _as_wide(model: nn.Module, width: int) -> int:
    """Modules whose weight is a vector of this width, the stream's or a head's: norms."""
    weights = (getattr(module, "weight", None) for module in model.modules())
    return sum(isinstance(weight, nn.Parameter) and weight.shape == (width,) for weight in weights)


def _whole_in_layers(model: nn.Module, layers: int, linear: Iterable[nn.Linear]) -> int:
    """Parameters in matrices of the decoder's layers that are not in 4 bits; 0: it has no list of as many modules."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers)
    found = next(lists, None)
    if found is None:
        return 0
    in_four_bits = {id(module.weight) for module in linear}
    for _, module in experts_modules(model):
        in_four_bits |= {id(module.get_parameter(name)) for name in weights_of_experts(module)}
    matrices = (each for each in found.parameters() if each.ndim > 1 and id(each) not in in_four_bits)
    return sum(each.numel() for each in matrices)


def _intermediate(config: Any, linear: Iterable[nn.Linear]) -> int:
    """The widest input of a linear module; experts are none, and a token goes through some of them."""
    width = next((n for name in _EXPERT_WIDTHS if (n := _plain(config, name))), 0)
    return max([module.in_features for module in linear] + [_chosen(config) * _first(width)], default=0)


def _chosen(config: Any) -> int:
    return _first(next((n for name in _CHOSEN if (n := _plain(config, name))), 0))


_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size")


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def load_tokenizer(folder: Path) -> Any:
    """The base model's tokenizer.

    Raises:
        UsageError: there is none, or it needs code of its own.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise UsageError(
            f"{folder}: no usable tokenizer ({str(error).strip()}); a base model needs its tokenizer.json: load the "
            "tokenizer once where its own library (sentencepiece, tiktoken) is installed, and save_pretrained it there"
        ) from error


def softcap_and_scale(config: Any) -> tuple[float | None, float]:
    """What a model with this config does to its logits: their cap (None: none), and the factor on them before it."""
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        factor = getattr(config, name, None)
        if isinstance(factor, int | float):  # MPT's may be a word, which transformers passes over
            scale *= factor or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    if config.model_type in _MULTIPLIED:
        divisor = 1 / divisor
    return next((cap for name in caps if (cap := getattr(config, name, None))), None), scale / divisor


_MULTIPLIED = ("hyperclovax",)
"""Families whose `logits_scaling` is a factor; elsewhere it divides."""
