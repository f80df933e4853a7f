"""The held-out examples by the values of a field: a bounded number of slices, the rarer values together in one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from job.core.section import Section

MOST_VALUES = 12
"""Of one field that have a slice of their own."""
_MOST_CHARACTERS = 80
"""Of a value, as a report names it."""


class SliceName(Section):
    """Which examples a slice holds."""

    field: str
    value: str | None
    """Of all its examples; None: their records have none, or `folded` says how many values they have."""
    folded: int = 0
    """Values that share this slice, each of fewer examples than those with their own; 0: it is one value's."""

    @property
    def words(self) -> str:
        """As people read it."""
        if self.folded:
            return f"{self.folded:,} other values"
        return "(none)" if self.value is None else self.value


class SliceLoss(Section):
    """The held-out examples of one value of a field at one step."""

    slice: SliceName
    examples: int
    tokens: int
    """Target tokens."""
    loss: float
    """Nats a target token."""
    plus_minus: float | None
    """Half of its 95 % interval, over the examples; None: of one alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Some of the held-out examples."""

    name: SliceName
    members: NDArray[np.bool_]
    """[N]."""


def slices_of(field: str, values: Sequence[str | None]) -> list[Slice]:
    """The slices of one field: the largest first, then what has no value, then what is folded; each example is in one.

    Args:
        field: of the records.
        values: of each example; None: its record has none.
    """
    named = [None if value is None else value[:_MOST_CHARACTERS] for value in values]
    counts = Counter(value for value in named if value is not None)
    ordered = sorted(counts, key=lambda value: (-counts[value], value))
    # One value that would be folded alone needs no more room than its slice.
    own = ordered if len(ordered) <= MOST_VALUES + 1 else ordered[:MOST_VALUES]
    found = [Slice(name=SliceName(field=field, value=v), members=_members(named, {v})) for v in own]
    if None in named:
        found.append(Slice(name=SliceName(field=field, value=None), members=_members(named, {None})))
    rare = {*ordered} - {*own}
    if rare:
        name = SliceName(field=field, value=None, folded=len(rare))
        found.append(Slice(name=name, members=_members(named, rare)))
    return found


def _members(values: Sequence[str | None], those: set[str] | set[None]) -> NDArray[np.bool_]:
    return np.array([value in those for value in values], dtype=bool)
