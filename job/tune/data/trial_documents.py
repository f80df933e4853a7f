"""Documents that a base and its engines are tried with before the first step, and the row that they make."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from job.core.data.packing import Rows
from job.tune.data.documents import Documents
from job.tune.data.micro_batch import MicroBatch

_LENGTHS = (24, 9, 16)
"""Tokens of documents of random tokens."""
_LENGTHS_OF_TEXT = (96, 48, 72)
"""Tokens of documents of text."""
_EXAMPLES_OF_TEXT = 16
"""Taken for them; short ones are put together."""
Text = Sequence[Tensor]
"""Token ids of examples that the base can read, each [tokens] int64. To a base that has learned to read, random tokens
are no text: its gradients on them are up to nine times as large by one engine in bf16 as by another, where both are
right (SmolLM2-135M; on text they are 0.14 apart in direction, and in fp32 equal). Empty: random tokens, for a base that
has learned nothing."""


def text_of(documents: Documents) -> Text:
    """The first documents of a side, for a self-test."""
    first = range(min(len(documents), _EXAMPLES_OF_TEXT))
    return [torch.from_numpy(documents.token_ids(document).astype(np.int64)) for document in first]


def trial_documents(
    text: Text, *, at_least: int, vocabulary: int, device: torch.device, rows: Rows = "packed"
) -> list[Tensor]:
    """Token ids of three, each [tokens] int64, the longest first.

    Args:
        text: what they are made of.
        at_least: tokens of the first one.
        vocabulary: what random tokens are drawn from.
        device: gets them.
        rows: how documents stand in a micro-batch.
    """
    first, *others = _LENGTHS_OF_TEXT if text else _LENGTHS
    longest = max(first, at_least)
    # Those that are padded are of like lengths, or each would have a group of rows to itself.
    lengths = (longest, longest - 2, longest - 1) if rows == "padded" else (longest, *others)
    if not text:
        return [torch.randint(0, vocabulary, (length,)).to(device) for length in lengths]
    return [_of_text(text[place % len(text) :], length).to(device) for place, length in enumerate(lengths)]


def _of_text(examples: Text, length: int) -> Tensor:
    """One example, and those behind it until there are enough tokens, over and over if need be."""
    ids = torch.cat(list(examples))
    return ids.repeat(-(-length // len(ids)))[:length]


def one_row(documents: Sequence[Tensor]) -> MicroBatch:
    """All of them in one row; every token but the first of each is a target."""
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
