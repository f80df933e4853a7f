"""What a rank gets of a run's steps: the micro-batches that its shares are cut into."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from job.core.data.lengths import Lengths
from job.core.data.packing import grain_of, pack_evenly
from job.core.plan.course import Course
from job.core.plan.dealing import deal

_ROOM = 32
"""One part of so many: a grain, see `grain_of`."""
_SOME = 32
"""Steps that are dealt, of those that a course looks at: so many of the first, of the largest, and of those with the
longest documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Shares of steps, as the ranks deal them."""

    lengths: tuple[tuple[int, ...], ...]
    """Tokens of each one's documents."""
    ranks: int
    """Processes that make each step together; of one a share is the whole step."""
    largest_step: int
    """Tokens of it, of as many steps as are looked at: in a long run the rest differ little."""
    all_seen: bool
    """Whether all steps were looked at; else a micro-batch may be as large as its cut allows."""

    @property
    def most(self) -> int:
        """Tokens of the largest one, with the room that it takes to cut it into equal micro-batches."""
        largest = max(sum(part) for part in self.lengths)
        return largest + largest // _ROOM

    def largest_micro_batch(self, budget: int) -> int:
        """Tokens of the largest micro-batch, where shares are cut as a step cuts them, at most so large."""
        return max(sum(part[i] for i in pack) for part in self.lengths for pack in cut_share(part, budget))


def shares_of(course: Course, lengths: Lengths, *, ranks: int) -> Shares:
    """Of some steps: the first ones, those with the most tokens, and those with the longest documents."""
    steps = np.array(course.steps_looked_at(lengths))  # [steps, 2]: tokens, and those of the longest document
    largest, longest = (np.argsort(-steps[:, column], kind="stable")[:_SOME].tolist() for column in (0, 1))
    found: list[tuple[int, ...]] = []
    for place in dict.fromkeys([*range(min(_SOME, len(steps))), *largest, *longest]):
        own = lengths[course.batch(place + 1)].tolist()
        dealt = [range(len(own))] if ranks == 1 else deal(own, shares=ranks)
        found += [tuple(own[i] for i in places) for places in dealt if places]
    return Shares(
        lengths=tuple(found),
        ranks=ranks,
        largest_step=int(steps[:, 0].max()),
        all_seen=len(steps) == course.steps,
    )


def cut_share(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """What one rank has of a step, into its micro-batches.

    Args:
        lengths: tokens of its documents.
        budget: the most of a micro-batch; a longer document has one to itself.

    Returns:
        Places in `lengths`, a list for each micro-batch.
    """
    return pack_evenly(lengths, most=max([budget, *lengths]), grain=grain_of(budget))
