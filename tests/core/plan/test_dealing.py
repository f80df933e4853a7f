"""Work is shared out whole, alike on every rank, and so that no rank waits long."""

import random
import statistics

from hypothesis import given
from hypothesis import strategies as st

from job.core.plan.dealing import deal

WEIGHTS = st.lists(st.integers(1, 4096), max_size=60)
SHARES = st.integers(1, 9)


@given(WEIGHTS, SHARES)
def test_everything_is_dealt_once(weights, shares):
    dealt = deal(weights, shares=shares)

    assert len(dealt) == shares
    assert sorted(place for places in dealt for place in places) == [*range(len(weights))]
    assert all(places == sorted(places) for places in dealt)


@given(WEIGHTS, SHARES)
def test_no_share_is_more_than_the_largest_weight_above_another(weights, shares):
    loads = [sum(weights[place] for place in places) for places in deal(weights, shares=shares)]

    assert max(loads) - min(loads) <= max(weights, default=0)


@given(WEIGHTS, SHARES)
def test_the_largest_share_is_no_larger_than_by_the_longest_first_alone(weights, shares):
    loads = [0] * shares
    for weight in sorted(weights, reverse=True):
        loads[loads.index(min(loads))] += weight

    assert max(sum(weights[place] for place in places) for places in deal(weights, shares=shares)) <= max(loads)


def test_sixteen_documents_are_dealt_to_two_ranks_nearly_evenly_and_to_four_better_than_greedily():
    def unevenness(shares):
        found = []
        for seed in range(100):
            chance = random.Random(seed)
            weights = [chance.randint(104, 304) for _ in range(16)]
            loads = [sum(weights[place] for place in places) for places in deal(weights, shares=shares)]
            found.append(max(loads) * shares / sum(loads) - 1)
        return statistics.mean(found)

    assert unevenness(2) < 0.001
    assert unevenness(4) < 0.008


@given(WEIGHTS)
def test_one_rank_has_all_of_it_in_order(weights):
    assert deal(weights, shares=1) == [[*range(len(weights))]]


@given(WEIGHTS, SHARES)
def test_every_rank_deals_alike(weights, shares):
    assert deal(weights, shares=shares) == deal(tuple(weights), shares=shares)


def test_ties_go_to_the_first_rank_and_more_ranks_than_work_leave_some_without():
    assert deal([5, 5, 5], shares=4) == [[0], [1], [2], []]
    assert deal([1, 9, 4, 4], shares=2) == [[1], [0, 2, 3]]
