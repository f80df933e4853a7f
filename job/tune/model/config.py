"""A base model's config and tokenizer: read without its code, and the sizes that the plan needs."""

from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from job.core.errors import UsageError
from job.core.memory import ModelShape

CONFIG = "config.json"


def read_config(folder: Path) -> Any:
    """The base model's config.

    Raises:
        UsageError: it needs code of its own, or transformers does not know it as a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UsageError(
            f"{folder}/config.json: not a model that transformers knows without running code from it ({error})"
        ) from error
    return config.get_text_config()


def causal_lm_of(config: Any) -> tuple[Any, Any]:
    """The class of the causal language model that a config describes, and the config that this class takes."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind, config if isinstance(config, kind.config_class) else config.get_text_config()


def shape_of(config: Any) -> ModelShape:
    """Sizes of a decoder from its config.

    Raises:
        UsageError: the config lacks a size, as those of decoders unlike Llama do.
    """
    try:
        hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
        intermediate, positions = config.intermediate_size, config.max_position_embeddings
    except AttributeError as error:
        raise UsageError(
            f"model.base: {config.model_type} is not like Llama: its config has no {error.name}; choose another base"
        ) from error
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or hidden // heads
    softcap, scale = softcap_and_scale(config)
    return ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        vocabulary=config.vocab_size,
        positions=positions,
        heads=heads,
        key_heads=key_heads,
        head_width=width,
        tied=config.tie_word_embeddings,
        logits="capped" if softcap is not None else "plain" if scale == 1 else "scaled",
    )


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
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return getattr(config, "final_logit_softcapping", None), scale / divisor
