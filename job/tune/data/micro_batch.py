"""Documents -> one row of tokens without padding, and where its targets are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from job.tune.data.documents import Documents


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Documents in a row, without padding. T tokens, N targets."""

    input_ids: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64; each document starts at 0."""
    document_lengths: tuple[int, ...]
    """Tokens of each document; their sum is T."""
    cu_seqlens: Tensor
    """[documents + 1] int32: 0, then where each document ends."""
    target_places: Tensor
    """[N] int64: places in T whose next token is a target."""
    target_ids: Tensor
    """[N] int64: those next tokens."""
    target_counts: tuple[int, ...]
    """Targets of each document; their sum is N."""
    documents: tuple[int, ...]
    """Which documents these are."""

    @property
    def tokens(self) -> int:
        """Real tokens: there are no others."""
        return sum(self.document_lengths)

    @property
    def targets(self) -> int:
        """Target tokens."""
        return sum(self.target_counts)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device, copied without waiting."""

        def moved(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        return MicroBatch(
            input_ids=moved(self.input_ids),
            position_ids=moved(self.position_ids),
            document_lengths=self.document_lengths,
            cu_seqlens=moved(self.cu_seqlens),
            target_places=moved(self.target_places),
            target_ids=moved(self.target_ids),
            target_counts=self.target_counts,
            documents=self.documents,
        )


def micro_batch(documents: Documents, members: Sequence[int]) -> MicroBatch:
    """Lay documents in a row; the loss reads the token before each target."""
    ids = [documents.token_ids(member).astype(np.int64) for member in members]
    starts = np.cumsum([0, *(len(i) for i in ids)])
    row = np.concatenate(ids)
    targets = [_positions(documents.spans(m)) for m in members]
    places = np.concatenate([t + start for t, start in zip(targets, starts[:-1], strict=True)]) - 1
    return MicroBatch(
        input_ids=torch.from_numpy(row)[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(len(i)) for i in ids]))[None],
        document_lengths=tuple(len(i) for i in ids),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        target_places=torch.from_numpy(places),
        target_ids=torch.from_numpy(row[places + 1]),
        target_counts=tuple(len(t) for t in targets),
        documents=tuple(members),
    )


def _positions(spans: NDArray[np.int32]) -> NDArray[np.int64]:
    """[targets]: every position in spans [spans, 2]."""
    return np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in spans])
