"""Documents into micro-batches: as few as hold them, about equally full; and how they stand in one."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Literal

Rows = Literal["packed", "padded", "alone"]
"""How the decoder gets the documents of a micro-batch: in one row; one a row, padded; one at a time."""
MOST_PADDING = 1 / 8
"""Of rows that are padded together, as a share of their real tokens."""


def pack(lengths: Sequence[int], *, budget: int) -> list[list[int]]:
    """Best-fit decreasing: documents into micro-batches of at most `budget` tokens each.

    Every document stays whole; each goes where the least room is left. Johnson 1973, "Near-optimal bin packing".

    Args:
        lengths: tokens of each document.
        budget: tokens of a micro-batch.

    Returns:
        Places in `lengths`, a list for each micro-batch, ascending inside.

    Raises:
        ValueError: a document is longer than the budget.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for i in order:
        if lengths[i] > budget:
            raise ValueError(f"a document of {lengths[i]} tokens does not fit a micro-batch of {budget}")
        at = bisect_left(room, (lengths[i], -1))
        left, chosen = room.pop(at) if at < len(room) else (budget, len(packs))
        if chosen == len(packs):
            packs.append([])
        packs[chosen].append(i)
        insort(room, (left - lengths[i], chosen))
    return [sorted(members) for members in packs]


_GRAINS, _LEAST_GRAIN = 32, 64


def grain_of(micro_batch_tokens: int) -> int:
    """What sizes of micro-batches are rounded up to before they are packed: a thirty-second of the largest, in 64s.

    Best fit needs that room; by the cut, which a resumed run keeps.
    """
    return -(-micro_batch_tokens // (_GRAINS * _LEAST_GRAIN)) * _LEAST_GRAIN


def pack_evenly(lengths: Sequence[int], *, most: int, grain: int = 1) -> list[list[int]]:
    """A step's documents into as few micro-batches of at most `most` tokens as hold them, about equally full.

    Four of 13,000 tokens are faster than three of 16,000 and a rest of 4,000: a small one does not fill the device.

    Args:
        lengths: tokens of each document; none is longer than `most`.
        most: tokens of a micro-batch.
        grain: sizes are a multiple of it at most, and nearly that, all but the last.

    Returns:
        As `pack`.
    """
    packs = pack(lengths, budget=most)
    even = max(-(-sum(lengths) // max(1, len(packs))), max(lengths, default=0))
    for room in (0, even // 32):  # full to the last token rarely works out, with a little room it does
        budget = -(-(even + room) // grain) * grain
        if budget < most and len(evenly := pack(lengths, budget=budget)) == len(packs):
            return evenly
    return packs


REPLAYED_TOKENS = 4096
"""Up to so many tokens a micro-batch of the fast engine is padded, and replayed as a CUDA graph."""


def padded_tokens(tokens: int, *, finely: bool) -> int:
    """What a micro-batch that is replayed is padded to: there are few sizes, and each is recorded once.

    Args:
        tokens: with at least one that is padding.
        finely: eight sizes from one power of two to the next, not four: where others wait for it.
    """
    unit = max(128, (1 << (tokens - 1).bit_length()) // (16 if finely else 8))
    return -(-tokens // unit) * unit


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Documents whose rows are padded together: of like lengths, so that at most `MOST_PADDING` is added.

    Args:
        lengths: tokens of each document.

    Returns:
        Places in `lengths`, a list for each group, the longest first.
    """
    groups: list[list[int]] = []
    widest, tokens = 0, 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens += lengths[i]
        if groups and widest * (len(groups[-1]) + 1) <= (1 + MOST_PADDING) * tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
            widest, tokens = lengths[i], lengths[i]
    return groups
