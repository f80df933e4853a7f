"""Token ids against the base's embeddings: what the tokenizer knows and the model has no row for."""

from collections.abc import Iterable, Sequence
from typing import Any

from job.core.vocabulary import refuse_beyond
from job.tune.data.encoded import EncodedSet
from job.tune.data.frame import TokenRules, encode_prompt


def refuse_unknown_ids(
    encoded: Iterable[EncodedSet], prompts: Sequence[str], tokenizer: Any, rules: TokenRules, *, rows: int
) -> None:
    """Look at the largest id of each side, and of each prompt that the model will be asked.

    Args:
        encoded: all sides.
        prompts: of `evaluate.prompts`.
        tokenizer: the base model's.
        rules: from `token_rules`.
        rows: of the base's embeddings.

    Raises:
        DataError: the embeddings have no row for it.
    """
    largest = [(*found, side) for side in encoded if (found := side.largest_id()) is not None]
    places = [(token, side.where(index)) for token, index, side in largest]
    asked = [(max(ids), f"evaluate.prompts: {p:.80}") for p in prompts if (ids := encode_prompt(p, tokenizer, rules))]
    for token, where in [*places, *asked]:
        refuse_beyond(token, tokenizer.convert_ids_to_tokens(token), rows=rows, where=where)
