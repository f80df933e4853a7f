"""Which examples have the same content, counted by their digests."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Digests = NDArray[np.uint64]
"""[examples, 2]: the content name of each, its first and its last eight bytes."""


def content_numbers(sides: Sequence[Digests]) -> list[NDArray[np.int64]]:
    """A number for each example of each side: the same one where the content is the same, on either side."""
    every = np.concatenate(sides)
    order = np.lexsort((every[:, 1], every[:, 0]))
    ordered = every[order]
    is_new = np.ones(len(every), dtype=bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    numbers = np.empty(len(every), dtype=np.int64)
    numbers[order] = np.cumsum(is_new)
    return np.split(numbers, np.cumsum([len(side) for side in sides])[:-1])


def repeated(numbers: NDArray[np.int64]) -> int:
    """Examples whose content an earlier one has."""
    return len(numbers) - len(np.unique(numbers))


def shared(numbers: NDArray[np.int64], others: NDArray[np.int64]) -> int:
    """Examples whose content is among the others."""
    return int(np.isin(numbers, others).sum())
