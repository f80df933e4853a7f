"""What servers of LoRA adapters refuse of one, by their own rules: docs/serving.md has the sources."""

from collections.abc import Mapping
from typing import Any

from job.core.recipe.schema import LoraSection

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be; an adapter's own rank may be any number up to it."""
VLLM_HEAD_ROWS = 258_048
"""The largest vocabulary whose head vLLM puts an adapter on."""
VLLM_WITH_TRANSFORMERS_5 = "0.19.1"
"""vLLM's first version that runs on transformers 5."""
GENERIC_TOKENIZER = "PreTrainedTokenizerFast"
"""The class by which transformers 4 and 5 read a tokenizer.json as it stands."""
_OF_VERSION_5 = "TokenizersBackend"
"""Its name since version 5, which version 4 refuses."""


def vllm_rank(rank: int) -> int | None:
    """The `--max-lora-rank` that vLLM needs for an adapter of this rank; None: it has none that is large enough."""
    return next((each for each in VLLM_RANKS if each >= rank), None)


def refusals(lora: LoraSection, *, rows: int) -> list[str]:
    """Which servers refuse the adapter of a recipe, each in a sentence with the way out; empty: none that is known.

    What no server could load is refused (64) where the targets are looked at: a head that is tied to the embeddings.

    Args:
        lora: the recipe's section.
        rows: of the base's vocabulary.
    """
    found = []
    if vllm_rank(lora.r) is None:
        found.append(f"vLLM refuses adapters of a rank above {VLLM_RANKS[-1]}, and lora.r is {lora.r}: lower it")
    if "lm_head" in lora.targets and rows > VLLM_HEAD_ROWS:
        found.append(
            f"vLLM refuses an adapter on lm_head of a vocabulary beyond {VLLM_HEAD_ROWS:,}, and this base has "
            f"{rows:,}: leave lm_head out of lora.targets"
        )
    if lora.on_experts:
        found.append(
            "vLLM is reported to pass over an adapter on a mixture's experts, in the form that PEFT gives it, without "
            "a word: leave experts out of lora.targets"
        )
    return [f"{each}, or merge the adapter into the base (export) and serve that" for each in found]


def readable_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a tokenizer_config.json says, in words that transformers 4 reads as well as 5.

    Args:
        settings: as either of them wrote it.
    """
    found = dict(settings)
    if found.get("tokenizer_class") == _OF_VERSION_5:
        found["tokenizer_class"] = GENERIC_TOKENIZER
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


def unreadable_base(settings: Mapping[str, Any]) -> list[str]:
    """Which servers cannot read a base's tokenizer, in a sentence with the way out; empty: all can.

    Args:
        settings: its tokenizer_config.json.
    """
    if readable_settings(settings) == settings:
        return []
    said = (
        f"servers on transformers 4 (vLLM before {VLLM_WITH_TRANSFORMERS_5}) cannot read this base's "
        "tokenizer_config.json, which version 5 wrote: take a newer one, or merge the adapter into the base (export), "
        "which writes what both read"
    )
    return [said]
