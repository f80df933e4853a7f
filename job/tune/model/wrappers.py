"""Multimodal models: which of their tensors and modules are the text decoder, the one part that is trained."""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from job.core.errors import UsageError
from job.tune.device.failures import error_line

T = TypeVar("T")
WRAPPERS = (
    *("gemma3", "gemma4", "gemma4_unified", "internvl", "lfm2_vl", "llava", "llava_next", "llava_onevision"),
    *("mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm"),
)
"""Those whose text decoder is trained, by model_type: with text alone it computes what the whole model does. Adding one
is an entry here and one in `tests/tune/tiny_wrappers.py`, whose tests hold it against the whole model."""
_PLAIN: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "qwen2_vl_text": ("qwen2", {}),
        "qwen2_5_vl_text": ("qwen2", {}),
        "qwen3_vl_text": ("qwen3", {}),
        "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    }
)
"""Decoders that transformers has no causal language model for; the family that they are where there is only text, as
the three positions that a token has beside pictures are one then; and what they have no setting for."""
_OF_PICTURES = frozenset({"mrope_section", "mrope_interleaved", "type"})
"""What their rotations need beside that family's."""
_STATE = re.compile(r"\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$")
"""What stands beside a weight in 4 bits."""


def text_config_of(config: Any) -> Any:
    """The config of the causal language model that is trained: of a multimodal one, its text decoder's.

    Raises:
        UsageError: it is a multimodal model whose decoder this job does not train.
    """
    text = config.get_text_config()
    if not _is_multimodal(config):
        return text
    if config.model_type not in WRAPPERS:
        raise UsageError(
            f"model.base: {config.model_type} is a model of more than text, and of those this job trains the text "
            f"decoder of {', '.join(WRAPPERS)} alone; take one of them, or a language model"
        )
    text = deepcopy(text)
    if text.model_type in _PLAIN:
        plain, own = _PLAIN[text.model_type]
        text = CONFIG_MAPPING[plain](**_settings(text), **own)
    text.tie_word_embeddings = config.tie_word_embeddings  # what counts is what the whole model says
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        text.quantization_config = quantised
    return text


def _is_multimodal(config: Any) -> bool:
    return config.get_text_config() is not config or type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def _settings(text: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {name: value for name, value in text.to_dict().items() if name != "model_type"}
    rope = settings.get("rope_parameters") or {}
    return settings | {"rope_parameters": {name: value for name, value in rope.items() if name not in _OF_PICTURES}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts(Generic[T]):
    """What a multimodal model's files hold, by what it belongs to."""

    text: Mapping[str, T]
    """The decoder's, by the names in its own class."""
    unknown: list[str]
    """Names of the files that are of no part of the model."""
    name: Callable[[str], str]
    """A name in the decoder's own class -> what a person finds in the files, or in the whole model."""


class Wrapper:
    """A multimodal model around its text decoder."""

    def __init__(self, config: Any) -> None:
        """Without values.

        Args:
            config: of the whole model, one of `WRAPPERS`.

        Raises:
            UsageError: transformers cannot build it.
        """
        kind = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
        try:
            with torch.device("meta"):
                self.whole: Any = kind(config)
        except Exception as error:  # parts beside the decoder may need any library, or be of any kind
            raise UsageError(
                f"model.base: {kind.__name__} cannot be built as config.json describes it ({error_line(error)}); "
                "correct the file, or take another base"
            ) from error
        self.architecture: str = kind.__name__
        """Its class, as adapters on it are loaded."""
        self._is_plain = config.get_text_config().model_type in _PLAIN
        embeddings, head = self.whole.get_input_embeddings(), self.whole.get_output_embeddings()
        names = {module: name for name, module in self.whole.named_modules()}
        self._decoder, self._head = names[embeddings].rpartition(".")[0], names[head]

    def inside(self, name: str) -> str | None:
        """What a tensor or module of the whole model is called in the decoder's own class; None: it is not in there."""
        for outer, inner in ((self._decoder, "model"), (self._head, "lm_head")):
            if name == outer or name.startswith(f"{outer}."):
                return f"{inner}{name.removeprefix(outer)}"
        return None

    def outside(self, name: str) -> str:
        """What a tensor or module of the decoder's own class is called in the whole model."""
        for outer, inner in ((self._decoder, "model"), (self._head, "lm_head")):
            if name == inner or name.startswith(f"{inner}."):
                return f"{outer}{name.removeprefix(inner)}"
        return name

    def left_out(self) -> dict[str, int]:
        """The parts beside the decoder, by name, with their parameters."""
        found: dict[str, int] = {}
        parent = self._decoder.rpartition(".")[0]
        for name, parameter in self.whole.named_parameters():
            if self.inside(name) is None:
                below = name.removeprefix(f"{parent}.")
                part = f"{name.removesuffix(below)}{below.partition('.')[0]}"
                found[part] = found.get(part, 0) + parameter.numel()
        return found

    def left_out_words(self) -> str:
        """The same for a person."""
        parts = [f"{name} ({parameters:,} parameters)" for name, parameters in self.left_out().items()]
        return ", ".join(parts) or "nothing that has weights"

    def parts(self, tensors: Mapping[str, T]) -> Parts[T]:
        """Sort what files hold, by the rules by which transformers itself renames the names in them.

        Args:
            tensors: by the names in the files, of this layout or of an older one.
        """
        rules = get_model_conversion_mapping(self.whole)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        expected, prefix = self.whole.state_dict(), self.whole.base_model_prefix
        ignored = [re.compile(each) for each in self.whole._keys_to_ignore_on_load_unexpected or ()]  # noqa: SLF001 - its own
        text, files, unknown = {}, {}, []
        for name in sorted(tensors, key=dot_natural_key):
            weight = _STATE.sub("", name)
            weight = weight if weight in tensors else name
            renamed, _ = rename_source_key(weight, renamings, [], prefix, expected)
            if renamed not in expected and weight in expected:
                renamed = weight
            inner = self.inside(renamed)
            if inner is not None:
                inner += name.removeprefix(weight)
                text[inner], files[inner] = tensors[name], name
            elif renamed not in expected:
                converted, _ = rename_source_key(weight, renamings, converters, prefix, expected)
                if converted not in expected and not any(each.search(renamed) for each in ignored):
                    unknown.append(name)
        return Parts(text=text, unknown=unknown, name=lambda name: files.get(name) or self.outside(name))

    def around(self, causal_lm: Any) -> Any:
        """The whole model with this decoder in it; its other parts have no values.

        Args:
            causal_lm: of the decoder's own class, with an adapter on it or without.
        """
        # Masks are made for the decoder by the whole model, and must be of the kind that its attention takes.
        attention = causal_lm.config._attn_implementation  # noqa: SLF001 - transformers has no other word for it
        self.whole.set_attn_implementation({"text_config": attention})
        if not self._is_plain:
            self.whole.set_submodule(self._decoder, causal_lm.model)
        else:
            self._fill(causal_lm.model)
        self.whole.set_submodule(self._head, causal_lm.get_output_embeddings())
        self.whole.generation_config = causal_lm.generation_config
        self.whole.is_loaded_in_4bit = getattr(causal_lm, "is_loaded_in_4bit", False)  # PEFT chooses its layers by it
        return self.whole.eval()

    @property
    def decoder(self) -> nn.Module:
        """The module of the whole model that its text decoder's layers are in."""
        found: nn.Module = self.whole.get_submodule(self._decoder)
        return found

    def _fill(self, decoder: nn.Module) -> None:
        """Put the modules of a decoder of the same family into the whole model's own."""
        own = self.decoder
        for name, module in list(own.named_modules()):
            if next(module.parameters(recurse=False), None) is not None:
                own.set_submodule(name, decoder.get_submodule(name))
            elif next(module.buffers(recurse=False), None) is not None:  # its rotation, which knows of pictures
                own.set_submodule(name, type(module)(module.config).to(next(decoder.parameters()).device))


def parts_of(config: Any, tensors: Mapping[str, T]) -> Parts[T]:
    """Sort what a base's files hold; of a language model alone, all of it is the decoder's."""
    wrapper = wrapper_of(config)
    return Parts(text=tensors, unknown=[], name=str) if wrapper is None else wrapper.parts(tensors)


def wrapper_of(config: Any) -> Wrapper | None:
    """The multimodal model that a base's config describes; None: it is a language model alone."""
    return Wrapper(config) if config.model_type in WRAPPERS else None
