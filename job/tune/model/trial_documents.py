"""The documents that a self-test tries a model with: longer than its limits, of text where the base can read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from job.core.packing import Rows
from job.tune.data.documents import Documents
from job.tune.data.micro_batch import MicroBatch
from job.tune.model.config import ROTATIONS_BY_LENGTH

_LENGTHS = (24, 9, 16)
"""Tokens of documents of random tokens; the first is longer than the limits that attention or rotations have."""
_LENGTHS_OF_TEXT = (96, 48, 72)
"""Tokens of documents of text."""
_EXAMPLES_OF_TEXT = 16
"""Taken for them; short ones are put together."""
Text = Sequence[Tensor]
"""Token ids of examples that the base can read, each [tokens] int64. To a base that has learned to read, random tokens
are no text: its gradients on them are up to nine times as large by one engine in bf16 as by another, where both are
right (SmolLM2-135M; on text they are 0.14 apart in direction, and in fp32 equal). Empty: random tokens, for a base that
has learned nothing."""
_LIMITS = (
    *("sliding_window", "attention_chunk_size", "original_max_position_embeddings", "window_size"),
    *("attention_window_size", "floor_scale", "chunk_size", "mamba_chunk_size", "block_size", "keep_window_size"),
)
"""Where configs name such limits, at their top or in their `rope_parameters`."""
_MOST_TOKENS = 600
"""Of a document: longer ones would take a GPU that just holds the model its memory. Limits beyond are not reached."""
_BEYOND = 8
"""Tokens by which the longest document passes them."""


def text_of(documents: Documents) -> Text:
    """The first documents of a side, for a self-test."""
    first = range(min(len(documents), _EXAMPLES_OF_TEXT))
    return [torch.from_numpy(documents.token_ids(document).astype(np.int64)) for document in first]


def trial_documents(config: Any, rows: Rows, device: torch.device, text: Text) -> list[Tensor]:
    """Three, each [tokens] int64 on the device, the longest first.

    Args:
        config: of the decoder.
        rows: how documents stand in a micro-batch.
        device: to be on.
        text: to make them of.
    """
    first, *others = _LENGTHS_OF_TEXT if text else _LENGTHS
    longest = _longest(config, least=first)
    # Those that are padded are of like lengths, or each would have a micro-batch to itself.
    lengths = (longest, longest - 2, longest - 1) if rows == "padded" else (longest, *others)
    if not text:
        return [torch.randint(0, config.vocab_size, (length,)).to(device) for length in lengths]
    return [_of_text(text[place % len(text) :], length).to(device) for place, length in enumerate(lengths)]


def _of_text(examples: Text, length: int) -> Tensor:
    """One example, and those behind it until there are enough tokens, over and over if need be."""
    ids = torch.cat(list(examples))
    return ids.repeat(-(-length // len(ids)))[:length]


def _longest(config: Any, *, least: int) -> int:
    """Tokens of a document that is longer than every limit that can be passed."""
    ropes = [getattr(config, "rope_parameters", None) or {}]
    ropes += [rope for rope in ropes[0].values() if isinstance(rope, dict)]
    named = [getattr(config, name, None) for name in _LIMITS] + [rope.get(name) for rope in ropes for name in _LIMITS]
    if any(rope.get("rope_type") in ROTATIONS_BY_LENGTH for rope in ropes):
        named.append(getattr(config, "max_position_embeddings", None))
    passed = [limit + _BEYOND for limit in named if isinstance(limit, int) and limit + _BEYOND <= _MOST_TOKENS]
    return max(least, *passed) if passed else least


def row_of(documents: Sequence[Tensor]) -> MicroBatch:
    """A micro-batch in which every token but the first of each document is a target."""
    lengths = [len(d) for d in documents]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    places = [torch.arange(start, start + length - 1) for start, length in zip(starts, lengths, strict=True)]
    cu_seqlens = torch.tensor([*starts, sum(lengths)], dtype=torch.int32, device=documents[0].device)
    return MicroBatch(
        input_ids=torch.cat(list(documents))[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(documents[0].device),
        document_lengths=tuple(lengths),
        cu_seqlens=cu_seqlens,
        target_places=torch.cat(places).to(documents[0].device),
        target_ids=torch.cat([d[1:] for d in documents]),
        target_counts=tuple(length - 1 for length in lengths),
        documents=tuple(range(len(lengths))),
    )
