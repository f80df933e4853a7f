"""Which rank does what: a step's documents, and the passes of an evaluation, shared out so that no rank waits long."""

import heapq
from collections.abc import Sequence


def deal(weights: Sequence[int], *, shares: int) -> list[list[int]]:
    """The longest first, each to the share that has the least so far: Graham 1969, "Bounds on multiprocessing timing".

    A pure function of its arguments, so that every rank deals alike and nothing has to be agreed on. No share is more
    than the largest weight above another one.

    Args:
        weights: tokens of each.
        shares: how many ranks there are.

    Returns:
        Places in `weights`, a list for each rank, ascending inside; all of them in order where there is one rank.
    """
    least = [(0, share) for share in range(shares)]
    dealt: list[list[int]] = [[] for _ in range(shares)]
    for place in sorted(range(len(weights)), key=lambda place: (-weights[place], place)):
        weight, share = least[0]
        dealt[share].append(place)
        heapq.heapreplace(least, (weight + weights[place], share))
    return [sorted(places) for places in dealt]
