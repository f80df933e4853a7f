"""Sums over ranks: of each place the ranks' numbers, added up from rank 0 on, the same bits on all of them."""

from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from job.core.plan.scaling import Cluster, sent_bytes
from job.tune.ranks import Ranks


class Group:
    """Some ranks, each a thread."""

    def __init__(self, members):
        self.members, self._given, self._all_here = members, {}, Barrier(len(members))

    def exchange(self, rank, mine):
        """What each member has given, in their order."""
        self._given[rank] = mine.clone()
        self._all_here.wait(30)
        given = [self._given[member] for member in self.members]
        self._all_here.wait(30)
        return given


class Exchanges:
    """torch.distributed, as one rank sees it; everything is done at once."""

    def __init__(self, rank):
        self._rank, self.made = rank, []

    def all_to_all_single(self, received, sent, *, group, async_op):
        rows = group.exchange(self._rank, sent)
        place = group.members.index(self._rank)
        received.copy_(torch.cat([row.view(len(rows), -1)[place] for row in rows]))
        return self._done("all to all")

    def all_gather_into_tensor(self, into, mine, *, group, async_op):
        into.copy_(torch.cat(group.exchange(self._rank, mine)))
        return self._done("all gather")

    def _done(self, what):
        self.made.append(what)
        return SimpleNamespace(wait=lambda *_: None)


def rank_of(number, levels):
    rank = Ranks.__new__(Ranks)  # without the processes that it would meet
    rank._dist, rank._levels, rank._kept = Exchanges(number), levels, {}
    rank._on_gpu, rank._rows, rank._patience = False, None, lambda: 30.0
    rank.rank, rank.bytes_sent, rank.before_meeting = number, 0, lambda: None
    return rank


def summed(vectors, levels_of):
    """Each rank's vector, once all are summed; and the ranks."""
    ranks = [rank_of(number, levels_of(number)) for number in range(len(vectors))]
    vectors = [vector.clone() for vector in vectors]
    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(lambda rank, vector: rank.sum_in_order([vector]), ranks, vectors))
    return vectors, ranks


def numbers(size, length):
    """Whose sum is another one in another order."""
    chance = torch.Generator().manual_seed(size * 1000 + length)
    return [torch.randn(length, generator=chance) * 10 ** (3 * rank % 7) for rank in range(size)]


@pytest.mark.parametrize("length", [1, 2, 7, 12, 1000, 1001])
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_a_sum_is_added_up_from_rank_0_on_and_the_same_everywhere(size, length):
    given, group = numbers(size, length), Group([*range(size)])
    found, ranks = summed(given, lambda _: [(group, size)])

    expected = reduce(torch.add, given)
    assert all(torch.equal(each, expected) for each in found)
    assert {rank.bytes_sent for rank in ranks} == {sent_bytes(length, Cluster(gpus=size))}


@pytest.mark.parametrize("length", [1, 8, 1001])
@pytest.mark.parametrize(("gpus", "nodes"), [(2, 2), (2, 3), (3, 2)])
def test_over_nodes_a_node_s_sums_are_added_up_from_node_0_on(gpus, nodes, length):
    given = numbers(gpus * nodes, length)
    within = [Group([*range(gpus * node, gpus * (node + 1))]) for node in range(nodes)]
    between = [Group([*range(place, gpus * nodes, gpus)]) for place in range(gpus)]
    found, _ = summed(given, lambda rank: [(within[rank // gpus], gpus), (between[rank % gpus], nodes)])

    of_nodes = [reduce(torch.add, given[gpus * node : gpus * (node + 1)]) for node in range(nodes)]
    assert all(torch.equal(each, reduce(torch.add, of_nodes)) for each in found)


def test_two_ranks_meet_once_for_a_piece_and_more_of_them_twice():
    for size, made in ((2, ["all gather"]), (4, ["all to all", "all gather"])):
        group = Group([*range(size)])
        _, ranks = summed(numbers(size, 64), lambda _, group=group, size=size: [(group, size)])

        assert ranks[0]._dist.made == made


def test_the_sum_of_one_vector_leaves_its_neighbours_alone():
    """Pieces are parts of one vector, and are sent from where they are."""
    group = Group([0, 1])
    wholes = [torch.arange(10.0), torch.arange(10.0) * 2]
    ranks = [rank_of(number, [(group, 2)]) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank, whole: rank.sum_in_order([whole[2:5]]), ranks, wholes))

    for number, whole in enumerate(wholes, 1):
        expected = torch.arange(10.0) * number
        expected[2:5] = torch.arange(2.0, 5.0) * 3
        assert torch.equal(whole, expected)
