"""Which pieces are summed when, in a world that doubles what it is given."""

import pytest
from torch import nn

from job.tune.loop import gradient_sum
from job.tune.loop.flat import FlatAdapter
from job.tune.loop.gradient_sum import GradientSum


class Doubling:
    """Two ranks with the same gradients."""

    def __init__(self, *, sums_early=True):
        self.sums_early, self.begun, self.waited = sums_early, [], 0

    def begin_sum(self, vector, after=None):
        self.begun.append((vector.clone(), after))

        def wait():
            self.waited += 1
            vector.mul_(2)

        return wait


@pytest.fixture
def layers():
    return nn.ModuleList(nn.Linear(3, 4, bias=False) for _ in range(4))


@pytest.fixture
def sum_of(monkeypatch, layers):
    def make(world, most=12):
        monkeypatch.setattr(gradient_sum, "SUM_PIECE", most)
        flat = FlatAdapter(layers)
        for number, layer in enumerate(layers):
            layer.weight.grad.fill_(number + 1)
        return GradientSum(world, flat), flat

    return make


def numbers(world):
    """Of the layers, in the order of their sums."""
    return [int(vector[0]) for vector, _ in world.begun]


def total(flat):
    return flat.vectors[0].grad.view(4, 12).mean(dim=1).tolist()


def test_nothing_is_summed_before_the_last_micro_batch(sum_of, layers):
    world = Doubling()
    summing, flat = sum_of(world)
    summing.on_finished(layers.parameters(), None)
    assert not world.begun

    summing.begin()
    summing.on_finished([layers[3].weight, layers[2].weight], "an event")
    assert numbers(world) == [4, 3]
    assert [after for _, after in world.begun] == ["an event", "an event"]
    summing.begin_rest()
    assert numbers(world) == [4, 3, 2, 1]
    assert world.waited == 0
    summing.finish()
    assert total(flat) == [2, 4, 6, 8]


def test_the_order_is_the_same_whatever_completes_first(sum_of, layers):
    world = Doubling()
    summing, _ = sum_of(world)
    summing.begin()
    for number, begun in [(0, []), (2, []), (3, [4, 3]), (1, [4, 3, 2, 1])]:
        summing.on_finished([layers[number].weight], None)
        assert numbers(world) == begun


def test_a_piece_waits_for_all_that_it_holds(sum_of, layers):
    world = Doubling()
    summing, flat = sum_of(world, most=32)  # the last 16 elements are a layer and a third of another
    summing.begin()
    summing.on_finished([layers[3].weight], None)
    assert not world.begun
    summing.on_finished([layers[2].weight], None)
    assert len(world.begun) == 1
    summing.on_finished([layers[1].weight, layers[0].weight], None)
    assert len(world.begun) == 2
    summing.begin_rest()
    summing.finish()
    assert total(flat) == [2, 4, 6, 8]


def test_what_is_summed_is_safe_from_what_is_computed_again(sum_of, layers):
    world = Doubling()
    summing, flat = sum_of(world)
    summing.begin()
    summing.on_finished([layers[3].weight], None)
    summing.put_aside()  # out of memory
    flat.clear()
    for number, layer in enumerate(layers):
        layer.weight.grad.fill_(10 * number + 10)
    summing.on_finished(layers.parameters(), None)  # of a micro-batch that may not be the last one
    assert numbers(world) == [4]
    summing.put_aside()  # and again
    summing.begin_rest()
    summing.finish()
    assert numbers(world) == [4, 30, 20, 10]
    assert total(flat) == [20, 40, 60, 8]
    assert world.waited == 4


def test_each_step_begins_anew(sum_of, layers):
    world = Doubling()
    summing, flat = sum_of(world)
    for _ in range(2):
        world.begun.clear()
        flat.clear()
        for layer in layers:
            layer.weight.grad.fill_(1)
        summing.begin()
        summing.on_finished([layers[3].weight], None)
        assert len(world.begun) == 1
        summing.put_aside()
        summing.begin_rest()
        summing.finish()
        assert len(world.begun) == 4


def test_where_it_cannot_be_hidden_it_is_made_at_the_end(sum_of, layers):
    world = Doubling(sums_early=False)
    summing, flat = sum_of(world)
    summing.begin()
    summing.on_finished(layers.parameters(), None)
    assert not world.begun
    summing.begin_rest()
    summing.finish()
    assert total(flat) == [2, 4, 6, 8]
