"""Token ids against the base's embeddings: what the tokenizer knows and the model has no row for."""

from collections.abc import Iterable, Sequence
from typing import Any

from job.core.vocabulary import refuse_beyond
from job.tune.data.encoded import EncodedSet


def refuse_unknown_ids(
    encoded: Iterable[EncodedSet], prompts: Iterable[tuple[str, Sequence[int]]], tokenizer: Any, *, rows: int
) -> None:
    """Look at the largest id of each side, and of each prompt that the model will be asked.

    Args:
        encoded: all sides.
        prompts: of `evaluate.prompts`, each with its ids.
        tokenizer: the base model's.
        rows: of the base's embeddings.

    Raises:
        DataError: the embeddings have no row for it.
    """
    largest = [(*found, side) for side in encoded if (found := side.largest_id()) is not None]
    places = [(token, side.where(index)) for token, index, side in largest]
    asked = [(max(ids), f"evaluate.prompts: {prompt:.80}") for prompt, ids in prompts if ids]
    for token, where in [*places, *asked]:
        refuse_beyond(token, tokenizer.convert_ids_to_tokens(token), rows=rows, where=where)
