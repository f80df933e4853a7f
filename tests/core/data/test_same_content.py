"""Repeated and shared content, counted a part at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.core.data import same_content
from job.core.data.same_content import count_repeated, count_shared, is_in_part

digests = st.lists(st.tuples(st.sampled_from([0, 1, 2**63]), st.integers(0, 9)), max_size=40)
used = st.sets(st.integers(0, 39))


def part_of(side):
    every = np.array(side, dtype=np.uint64).reshape(-1, 2)

    def part(number, of):
        rows = np.flatnonzero(is_in_part(every, number, of))
        return rows, every[rows]

    return part


@pytest.mark.parametrize("at_once", [1, 7, 10**6])
@given(digests, digests, used, used)
def test_counts_are_those_of_sets(at_once, one, other, some, others):
    before, same_content.AT_ONCE = same_content.AT_ONCE, at_once
    try:
        assert count_repeated(part_of(one), examples=len(one)) == len(one) - len(set(one))
        mine = sorted(row for row in some if row < len(one))
        theirs = sorted(row for row in others if row < len(other))
        found = count_shared(
            part_of(one),
            part_of(other),
            used=np.array(mine, dtype=np.int64),
            others_used=np.array(theirs, dtype=np.int64),
            examples=len(one) + len(other),
        )
        assert found == sum(one[row] in {other[each] for each in theirs} for row in mine)
    finally:
        same_content.AT_ONCE = before
