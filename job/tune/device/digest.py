"""A digest of bytes that a device computes where they are: whose difference is one of the bytes."""

import torch
from torch import Tensor

_PIECE = 2**22
"""Words that are looked at together: their numbers take eight bytes each."""
_ODD = -7046029254386353131
"""2**64 over the golden ratio, as a signed number."""


def digest(content: Tensor) -> Tensor:
    """Of a vector's bits, each word of four bytes weighted by its place with an odd number, modulo 2**64: [] int64.

    A single word that is another one always shows, as do two that have changed places. It is no defence against
    somebody who means to deceive it.

    Args:
        content: contiguous, in whole words.
    """
    words = content.detach().view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _PIECE):
        piece = words[start : start + _PIECE].to(torch.int64)
        weights = torch.arange(start, start + len(piece), device=words.device) * _ODD | 1
        total += (piece * weights).sum()
    return total
