"""Compares what the examples end with to what the base's own settings stop at."""

from pathlib import Path
from typing import Any

from job.tune.data.documents import Documents
from job.tune.model.tokenizer import generation_stops


def stops_elsewhere(folder: Path, tokenizer: Any, documents: Documents) -> list[str]:
    """A note where the base's generation_config stops at other tokens than those that are trained.

    Args:
        folder: the base's.
        tokenizer: the base's.
        documents: what is trained on.
    """
    stops, trained = generation_stops(folder), documents.ends()
    missing = sorted(trained - set(stops))
    if not stops or not missing:
        return []
    return [
        (
            f"the base's generation_config stops at {_named(stops, tokenizer)}, and the examples end with "
            f"{_named(sorted(trained), tokenizer)}: a server that takes the base's settings does not stop there; "
            f"give it eos_token_id {missing if len(missing) > 1 else missing[0]} as well"
        )
    ]


def _named(tokens: list[int], tokenizer: Any) -> str:
    return " and ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in tokens)
