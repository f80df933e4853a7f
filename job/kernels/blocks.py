"""How a row of documents is cut for our attention kernels: into blocks that no two documents share."""

import torch
from torch import Tensor

BLOCK = 64
"""Tokens of a block, at most; the keys of a step are as many."""


def blocks_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Blocks of at most `BLOCK` tokens that no two documents share: where its document begins, itself, and both end.

    As many as any documents of so many tokens could need, so that the host need not know; those too many are empty.

    Args:
        cu_seqlens: [D + 1] int32 on the device: 0, then where each document ends; the last is T.
        tokens: T.

    Returns:
        [B, 3] int32: the document's start, the block's, the document's end.
    """
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    counts = (ends - starts + (BLOCK - 1)) // BLOCK
    upto = counts.cumsum(0, dtype=torch.int32)
    at = torch.arange(tokens // BLOCK + len(starts), device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(upto, at, right=True).clamp_(max=len(starts) - 1)
    first = starts[document] + (at - (upto - counts)[document]) * BLOCK
    return torch.stack([starts[document], first, ends[document]], dim=1)
