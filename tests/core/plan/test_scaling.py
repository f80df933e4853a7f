"""What several GPUs make of a step: shares as they are dealt, bytes as they are sent, and what is hidden of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_2_7b import LLAMA_2_7B, WORK

from job.core.plan.course import plan_course
from job.core.plan.forecast import forecast
from job.core.plan.gpus import GPUS, Gpu, gpu_named
from job.core.plan.links import NVLINK_4, network
from job.core.plan.memory import ExpertsShape, row_bytes
from job.core.plan.scaling import (
    ALONE,
    SUM_PIECE,
    Cluster,
    busiest,
    cluster_of,
    dealt_steps,
    gather_seconds,
    left_of_sum,
    sent_bytes,
    sum_seconds,
    times_one,
    waiting_for_gathers,
)

PARAMETERS = WORK.adapter.parameters
H200 = gpu_named("h200")


def of_batch(size, **changes):
    course = plan_course(examples=7000, batch_size=size, steps=100, epochs=None, seed=0)
    return replace(WORK, course=course, **changes)


def dealt(size, ranks):
    return dealt_steps(of_batch(size).course, WORK.lengths, ranks=ranks)


# --- shares ----------------------------------------------------------------------------------------------------------


def test_a_step_is_dealt_whole_document_by_document():
    for step in dealt(16, 4):
        assert sum(share.tokens for share in step.shares) == step.whole.tokens
        assert sum(share.examples for share in step.shares) == step.whole.examples == 16


def test_with_few_documents_shares_are_uneven_and_with_many_they_are_not():
    assert busiest(dealt(256, 2)) < 1.001
    assert busiest(dealt(16, 2)) < busiest(dealt(16, 8)) < busiest(dealt(16, 16)) < 2
    assert busiest(dealt(2, 4)) > 2  # two of the four have none


def tokens_of(share):
    return share.tokens


def test_one_gpu_is_once_as_fast():
    assert times_one(dealt(16, 1), seconds=tokens_of, exchange=lambda _: 0.0, alone=tokens_of) == 1


@settings(deadline=None, derandomize=True, database=None, max_examples=30)
@given(
    ranks=st.integers(1, 9),
    size=st.integers(1, 40),
    fixed=st.floats(0, 1000),
    exchange=st.floats(0, 1000),
)
def test_several_are_at_most_as_many_times_as_fast_and_an_exchange_only_costs(ranks, size, fixed, exchange):
    steps = dealt(size, ranks)

    def seconds(share):
        return fixed + share.tokens if share.examples else 0.0

    without = times_one(steps, seconds=seconds, exchange=lambda _: 0.0, alone=seconds)
    found = times_one(steps, seconds=seconds, exchange=lambda _: exchange, alone=seconds)
    assert found <= without <= ranks * (1 + 1e-9)
    assert found == pytest.approx(without) or exchange > 0


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_each_rank_sends_twice_its_share_of_what_is_not_its_own():
    assert sent_bytes(PARAMETERS, ALONE) == 0
    assert sent_bytes(PARAMETERS, Cluster(gpus=2)) == 4 * PARAMETERS
    for ranks in (3, 4, 8, 64):
        for cluster in (Cluster(gpus=ranks), cluster_of(gpus=1, nodes=ranks, gigabits=100)):
            sent = 2 * (ranks - 1) / ranks * 4 * PARAMETERS
            assert sent_bytes(PARAMETERS, cluster) == pytest.approx(sent, rel=1e-5)
    both = 2 * (7 / 8 + 1 / 8 * 3 / 4) * 4 * PARAMETERS  # of eight parts seven, of one of them three quarters
    assert sent_bytes(PARAMETERS, cluster_of(gpus=8, nodes=4, gigabits=100)) == pytest.approx(both, rel=1e-5)


def test_a_sum_takes_what_its_bytes_take_on_the_link_and_in_the_memory():
    found = sum_seconds(PARAMETERS, Cluster(gpus=2), NVLINK_4, memory_bytes_per_second=4.8e12)
    on_the_link = sent_bytes(PARAMETERS, Cluster(gpus=2)) / 360e9

    assert on_the_link + 6 * 4 * PARAMETERS / 4.8e12 < found < on_the_link + 6 * 4 * PARAMETERS / 4.8e12 + 5e-4
    assert sum_seconds(PARAMETERS, ALONE, NVLINK_4, memory_bytes_per_second=4.8e12) == 0


def test_a_sum_is_hidden_as_long_as_the_backward_takes_but_for_its_last_piece():
    pieces = math.ceil(PARAMETERS / SUM_PIECE)

    def left(summing, backward):
        return left_of_sum(summing, parameters=PARAMETERS, backward=backward)

    assert left(0.010, 0.0) == 0.010
    assert left(0.010, 10.0) == pytest.approx(0.010 / pieces)
    assert left(0.010, 0.005) == pytest.approx(0.010 - 0.005 * (pieces - 1) / pieces)
    assert left_of_sum(0.001, parameters=SUM_PIECE, backward=10.0) == 0.001  # one piece, complete at the end


def test_between_nodes_the_network_sets_the_pace_and_more_gpus_of_a_node_share_it():
    def seconds(gpus, nodes, gigabits=100):
        cluster = cluster_of(gpus=gpus, nodes=nodes, gigabits=gigabits)
        return sum_seconds(PARAMETERS, cluster, NVLINK_4, memory_bytes_per_second=4.8e12)

    two_nodes = 4 * PARAMETERS / 11.25e9  # half of the vector there, and half of it back
    assert seconds(1, 2) == pytest.approx(two_nodes, rel=0.06)
    assert seconds(8, 2) == pytest.approx(two_nodes + seconds(8, 1), rel=0.06)  # each its own part
    assert seconds(1, 2, gigabits=400) < seconds(1, 2) / 3
    assert seconds(2, 1) < seconds(1, 2) / 10


def test_a_layer_that_is_gathered_while_the_one_before_is_computed_costs_what_is_left():
    def waiting(gather, computing, passes=1):
        return waiting_for_gathers(gather, layers=32, passes=passes, computing=computing)

    assert waiting(0.001, 32 * 3 * 0.002) == 0
    assert waiting(0.003, 32 * 3 * 0.002) == pytest.approx(31 * 0.001)  # forward only: backward takes 4 ms
    assert waiting(0.005, 32 * 3 * 0.002) == pytest.approx(31 * (0.003 + 0.001))
    assert waiting(0.005, 2 * 32 * 3 * 0.002, passes=2) == pytest.approx(2 * 31 * (0.003 + 0.001))


def test_a_gather_takes_what_comes_from_the_others():
    assert gather_seconds(440_000_000, Cluster(gpus=2), NVLINK_4) == pytest.approx(220e6 / 360e9, rel=0.1)
    assert gather_seconds(440_000_000, cluster_of(gpus=1, nodes=2, gigabits=100), NVLINK_4) > 0.018


def test_a_network_is_named_by_its_speed():
    assert network(400).rate == 50e9
    assert network(100).name == "a network of 100 Gbit/s"
    assert cluster_of(gpus=8, nodes=1, gigabits=100).network is None


# --- what comes of it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("size", [16, 256])
def test_two_gpus_of_a_kind_are_nearly_twice_as_fast(gpu, size):
    one, two = (forecast(of_batch(size), gpu, Cluster(gpus=gpus)) for gpus in (1, 2))

    assert one.scaled is None
    assert (1.95 if size == 256 else 1.6) < two.scaled.times_one <= 2
    assert two.tokens_per_second == one.tokens_per_second * two.scaled.times_one
    assert two.training_seconds < one.training_seconds
    assert two.start_seconds > one.start_seconds


def test_a_price_is_one_gpu_s_and_the_cost_is_that_of_all():
    two = forecast(WORK, H200, Cluster(gpus=2))

    assert two.usd(3.0) == 2 * 3.0 * two.seconds / 3600


def test_a_small_batch_over_many_gpus_and_a_slow_network_is_slower_than_one_node():
    one_node, eight = (forecast(of_batch(16), H200, cluster_of(gpus=8, nodes=nodes, gigabits=100)) for nodes in (1, 8))

    assert eight.tokens_per_second < one_node.tokens_per_second
    assert eight.scaled.exchange_seconds > 0.03


def test_an_evaluation_ends_when_its_busiest_rank_does():
    """One pass is one rank's, however many there are."""
    tokens = forecast(WORK, H200).memory.cut.evaluation_tokens

    def evaluating(passes, gpus):
        often = of_batch(256, validation_tokens=passes * tokens, evaluations=50)
        none = replace(often, validation_tokens=0)
        cluster = Cluster(gpus=gpus)
        return forecast(often, H200, cluster).training_seconds - forecast(none, H200, cluster).training_seconds

    assert evaluating(1, 8) == pytest.approx(evaluating(1, 1))
    assert evaluating(8, 8) == pytest.approx(evaluating(8, 1) / 8)
    assert evaluating(9, 8) == pytest.approx(evaluating(9, 1) * 2 / 9)


# --- a base that fits no single GPU ----------------------------------------------------------------------------------

LLAMA_2_70B = replace(
    LLAMA_2_7B,
    layers=80,
    hidden=8192,
    intermediate=28672,
    heads=64,
    key_heads=8,
    linear_parameters=68_451_041_280,
    whole_parameters=2 * 32000 * 8192 + 161 * 8192,
)
LARGE = of_batch(16, shape=LLAMA_2_70B, adapter=replace(WORK.adapter, parameters=207_000_000))


def test_the_base_is_whole_where_it_fits_and_else_in_parts():
    for name, gpus, placement in (("h100", 2, "replicated"), ("a100-40", 2, "sharded"), ("a100-40", 1, "replicated")):
        found = forecast(LARGE, gpu_named(name), Cluster(gpus=gpus))
        assert (found.placement, found.fits) == (placement, (name, gpus) != ("a100-40", 1))


def test_a_sharded_base_takes_its_share_and_two_layers_and_keeps_no_decoded_weights():
    found = forecast(LARGE, gpu_named("a100-40"), Cluster(gpus=2))
    base = 0.5157 * LLAMA_2_70B.linear_parameters

    assert found.parts.weights == pytest.approx(base / 2 + 2 * base / 80, rel=2e-3)
    assert found.parts.embeddings == 2 * LLAMA_2_70B.whole_parameters
    assert found.memory.cut.kept_layers == 0
    assert found.memory.predicted_peak_bytes < 38.7 * 2**30
    experts = replace(LARGE, shape=replace(LLAMA_2_70B, layer_whole_parameters=10_000_000))
    shared = forecast(experts, gpu_named("a100-40"), Cluster(gpus=2)).parts
    assert found.parts.embeddings - shared.embeddings == 20_000_000
    assert shared.weights - found.parts.weights == pytest.approx(20_000_000 * (1 / 2 + 2 / 80), rel=1e-3)
    fewer = forecast(LARGE, gpu_named("a100-40"), Cluster(gpus=4))
    assert fewer.parts.weights < 0.6 * found.parts.weights


def test_gathering_costs_time_where_links_are_slow_and_micro_batches_small():
    def exchanging(name, batch, nodes=1):
        work = of_batch(batch, shape=LLAMA_2_70B, adapter=LARGE.adapter)
        found = forecast(work, gpu_named(name, memory_gib=31.4), cluster_of(gpus=2, nodes=nodes, gigabits=100))
        assert found.placement == "sharded"
        return found.scaled.exchange_seconds

    assert exchanging("h100", 256) < 0.02  # the sum alone
    assert exchanging("h100", 4, nodes=2) > 1  # 39 GB pass the network twice
    assert exchanging("rtx5090", 4) > exchanging("h100", 4)


def test_a_base_that_fits_several_no_more_than_one_is_said_not_to_fit():
    found = forecast(LARGE, gpu_named("l4"), Cluster(gpus=2))

    assert (found.fits, found.placement) == (False, "sharded")
    assert forecast(LARGE, gpu_named("l4"), Cluster(gpus=8)).fits


def test_a_base_that_cannot_be_spread_is_whole_on_each_gpu_and_does_not_fit():
    found = forecast(
        replace(LARGE, against_shards="its layers share their weights"), gpu_named("a100-40"), Cluster(gpus=2)
    )

    assert (found.fits, found.placement) == (False, "replicated")


def test_a_mixture_is_spread_with_its_experts():
    experts = ExpertsShape(
        parameters=60_000_000_000, sides=1, number=128, chosen=8, first=1536, inner=768, largest=400_000_000
    )
    of_dense = replace(LLAMA_2_70B, linear_parameters=LLAMA_2_70B.linear_parameters - experts.parameters)
    shape = replace(of_dense, experts=experts, layer_whole_parameters=80 * 128 * 8192)
    found = forecast(of_batch(16, shape=shape, adapter=LARGE.adapter), gpu_named("a100-40"), Cluster(gpus=2))
    dense = forecast(LARGE, gpu_named("a100-40"), Cluster(gpus=2))

    assert found.placement == "sharded"
    routers = 2 * shape.layer_whole_parameters
    assert found.parts.weights - dense.parts.weights == pytest.approx(routers * (1 / 2 + 2 / 80), rel=1e-3)
    assert row_bytes(shape) - row_bytes(LLAMA_2_70B) == pytest.approx(routers / 80, rel=1e-3)


def test_a_gpu_that_is_not_known_has_a_placement_and_no_time():
    found = forecast(LARGE, Gpu(name="x", memory_gib=40, speed=None, link=None), Cluster(gpus=2))

    assert found.placement == "sharded"
    assert (found.scaled, found.tokens_per_second, found.seconds) == (None, None, None)


def test_lengths_that_differ_much_are_less_even():
    lengths = np.where(np.arange(7000) % 16 == 0, 4000, 100).astype(np.int32)

    assert busiest(dealt_steps(of_batch(16).course, lengths, ranks=4)) > 1.5
