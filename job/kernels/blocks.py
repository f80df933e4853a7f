"""Blocks of a row for our attention kernels: each block belongs to one document."""

import torch
from torch import Tensor

BLOCK = 64
"""Tokens of a block at most, and keys that a program reads at a time."""


def blocks_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Divide each document into blocks of at most `BLOCK` tokens.

    There are as many rows as D documents of T tokens could need at most, so that the host need not wait for the real
    number. The rows left over are empty blocks: they start at the end of the last document, or after it.

    Args:
        cu_seqlens: [D + 1] int32 on the device: 0, then where each document ends; the last is T.
        tokens: T.

    Returns:
        [B, 3] int32: start of the block's document, start of the block, end of the document.
    """
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    counts = (ends - starts + (BLOCK - 1)) // BLOCK
    upto = counts.cumsum(0, dtype=torch.int32)
    at = torch.arange(tokens // BLOCK + len(starts), device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(upto, at, right=True).clamp_(max=len(starts) - 1)
    first = starts[document] + (at - (upto - counts)[document]) * BLOCK
    return torch.stack([starts[document], first, ends[document]], dim=1)
