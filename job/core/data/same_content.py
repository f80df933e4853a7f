"""How many examples have the same content, counted by their digests: a part of them at a time, whatever there is."""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 2**18
"""Examples that are compared at once, about."""
Digests = NDArray[np.uint64]
"""[examples, 2]: the content name of each, its first and its last eight bytes."""
Rows = NDArray[np.int64]
PartOf = Callable[[int, int], tuple[Rows, Digests]]
"""(number, of): the examples of one part of a side, ascending, and their digests; see `is_in_part`."""


def is_in_part(digests: Digests, number: int, of: int) -> NDArray[np.bool_]:
    """Which examples belong to one of so many parts: the same content always to the same one."""
    inside: NDArray[np.bool_] = digests[:, 1] % np.uint64(of) == np.uint64(number)
    return inside


def count_repeated(side: PartOf, *, examples: int) -> int:
    """Examples of a side whose content an earlier one has."""
    return examples - sum(len(_distinct(side(*part)[1])) for part in _parts(examples))


def count_shared(one: PartOf, other: PartOf, *, used: Rows, others_used: Rows, examples: int) -> int:
    """Examples of one side whose content the other has as well.

    Args:
        one: the side whose examples are counted.
        other: the other side.
        used: rows of the one side that count, ascending.
        others_used: of the other side.
        examples: of both sides together.
    """
    shared = 0
    for part in _parts(examples):
        mine, theirs = _among(one(*part), used), _distinct(_among(other(*part), others_used))
        both, numbers = np.unique(np.concatenate([theirs, mine]), axis=0, return_inverse=True)
        found = np.zeros(len(both), dtype=bool)
        found[numbers[: len(theirs)]] = True
        shared += int(found[numbers[len(theirs) :]].sum())
    return shared


def _parts(examples: int) -> Iterator[tuple[int, int]]:
    of = -(-examples // AT_ONCE)
    return ((number, of) for number in range(of))


def _distinct(digests: Digests) -> Digests:
    found: Digests = np.unique(digests, axis=0)
    return found


def _among(part: tuple[Rows, Digests], used: Rows) -> Digests:
    rows, digests = part
    # Both ascend, so that each is found by halving.
    places = np.searchsorted(used, rows)
    is_used = np.zeros(len(rows), dtype=bool)
    inside = places < len(used)
    is_used[inside] = used[places[inside]] == rows[inside]
    return digests[is_used]
