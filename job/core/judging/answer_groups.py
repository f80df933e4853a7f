"""Which questions are answered together: those of like lengths, as many as there is memory for."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

_ROWS = sorted({1, *(2**n for n in range(1, 11)), *(3 * 2**n for n in range(2, 9))})
"""Sizes of a group: each is prepared for once, so there are few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerGroup:
    """Questions that are answered together, the shortest first."""

    members: tuple[int, ...]
    width: int
    """Tokens that there is room for, of each question with its answer."""

    def halves(self) -> tuple["AnswerGroup", ...]:
        """What is left to try where the group does not fit; empty: it is one question alone."""
        middle = len(self.members) // 2
        if not middle:
            return ()
        parts = self.members[:middle], self.members[middle:]
        return tuple(AnswerGroup(members=part, width=self.width) for part in parts)


def answer_groups(
    lengths: Sequence[int],
    kinds: Sequence[Hashable],
    *,
    longest_answer: int,
    most_rows: int,
    most_tokens: int,
    unit: int,
) -> Iterator[AnswerGroup]:
    """Groups that are within both limits in the size that they are run in; a question too long for them is alone.

    Args:
        lengths: tokens of each question.
        kinds: what may not be mixed.
        longest_answer: tokens.
        most_rows: questions at once.
        most_tokens: of all of them with their answers, at most.
        unit: widths are multiples of it.
    """

    def width_of(length: int) -> int:
        return -(-(length + longest_answer) // unit) * unit

    numbered = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    ordered = sorted(range(len(lengths)), key=lambda i: (numbered[kinds[i]], lengths[i]))
    widest = width_of(max(lengths, default=0))
    # One width for all, where that costs no rows: what was prepared for one group then serves the next.
    common = widest if rows_for(min(most_rows, len(ordered))) * widest <= most_tokens else 0
    members: list[int] = []
    for i in ordered:
        width = max(common, width_of(lengths[i]))  # the longest so far sets that of all
        if members and (
            len(members) == most_rows
            or rows_for(len(members) + 1) * width > most_tokens
            or numbered[kinds[i]] != numbered[kinds[members[-1]]]
        ):
            yield AnswerGroup(members=tuple(members), width=max(common, width_of(lengths[members[-1]])))
            members = []
        members.append(i)
    if members:
        yield AnswerGroup(members=tuple(members), width=max(common, width_of(lengths[members[-1]])))


def rows_for(count: int) -> int:
    """The size that a group of so many is run in."""
    return next((size for size in _ROWS if size >= count), count)


def moves_to_front(alive: Sequence[bool], rows: int) -> list[tuple[int, int]]:
    """From where to where rows move, so that those alive are among the first `rows`; as few as possible.

    Args:
        alive: of each row.
        rows: at least as many as are alive.
    """
    free = [row for row in range(min(rows, len(alive))) if not alive[row]]
    beyond = [row for row in range(rows, len(alive)) if alive[row]]
    return list(zip(beyond, free, strict=False))
