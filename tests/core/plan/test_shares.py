"""What ranks get of a run's steps, and the memory that it takes, as measured on two GPUs."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_2_7b import LLAMA_2_7B, WORK, one_step

from job.core.data.packing import grain_of, pack_evenly, padded_tokens
from job.core.plan.course import plan_course
from job.core.plan.cut import plan_memory
from job.core.plan.dealing import deal
from job.core.plan.forecast import forecast
from job.core.plan.gpus import gpu_named
from job.core.plan.memory import GIB, DeviceMemory
from job.core.plan.scaling import Cluster
from job.core.plan.shares import Shares, cut_share, shares_of

H200 = DeviceMemory(kind="cuda", name="NVIDIA H200", free_bytes=int(139.1 * GIB))


def planned(shares, *, shards=1, engine="fast"):
    """Llama-2-7B, GSM8K, as it was run."""
    return plan_memory(
        LLAMA_2_7B,
        WORK.adapter,
        engine=engine,
        device=H200,
        max_length=512,
        shards=shards,
        shares=shares,
    )


def course_of(size, steps=40):
    return plan_course(examples=len(WORK.lengths), batch_size=size, steps=steps, epochs=None, seed=0)


@pytest.mark.parametrize(("shards", "measured_gib"), [(1, 57.09), (2, 43.73)])
def test_the_peak_is_what_two_h200_took_of_a_share_of_two_micro_batches(shards, measured_gib):
    """26,983 tokens of the largest share, in two of at most 13,824, where one GPU's steps are cut at 18,432."""
    share = [27 * (512,), 25 * (512,) + (359,)]
    plan = planned(Shares(lengths=(share[0] + share[1],), ranks=2, largest_step=53_964, all_seen=True), shards=shards)

    assert plan.cut.micro_batch_tokens == 14_336
    assert plan.peak_tokens == 13_824
    assert plan.predicted_peak_bytes == pytest.approx(measured_gib * GIB, rel=0.01)
    by_one = planned(shares_of(WORK.course, WORK.lengths, ranks=1), shards=shards)  # as one GPU's steps are cut
    assert by_one.predicted_peak_bytes > 1.2 * measured_gib * GIB


@pytest.mark.parametrize(
    ("size", "cut", "at_peak", "measured_gib"), [(256, 18_432, 18_432, 70.35), (2, 1024, 1024, 19.5)]
)
def test_one_gpu_s_peak_is_what_was_measured(size, cut, at_peak, measured_gib):
    """On an H200 and an H100; of small steps at least what an evaluation's passes take."""
    plan = planned(shares_of(course_of(size), WORK.lengths, ranks=1))

    assert (plan.cut.micro_batch_tokens, plan.peak_tokens) == (cut, at_peak)
    assert plan.predicted_peak_bytes == pytest.approx(measured_gib * GIB, rel=0.05)


def test_steps_that_are_cut_into_less_than_the_cut_allows_take_less():
    shares = shares_of(course_of(64), WORK.lengths, ranks=1)
    plan = planned(shares)
    longer = planned(shares_of(course_of(64, steps=1001), WORK.lengths, ranks=1))

    assert plan.peak_tokens == shares.largest_micro_batch(plan.cut.micro_batch_tokens) < plan.cut.micro_batch_tokens
    assert longer.peak_tokens == longer.cut.micro_batch_tokens  # steps that nobody looked at may be larger


@pytest.mark.parametrize("free_gib", [9.08, 12.2, 22.8, 139.1])
@pytest.mark.parametrize("tokens", [1024, 2048, 8192])
def test_a_peak_is_never_above_that_of_the_cut_which_fits(free_gib, tokens):
    """Where small micro-batches are padded beyond it, too."""
    plan = plan_memory(
        LLAMA_2_7B,
        WORK.adapter,
        engine="fast",
        device=replace(H200, free_bytes=int(free_gib * GIB)),
        max_length=512,
        shares=one_step(tokens),
    )

    assert plan.predicted_peak_bytes < free_gib * GIB
    assert plan.peak_tokens <= plan.cut.micro_batch_tokens


def test_the_largest_step_is_among_what_is_looked_at():
    """It is none of the first, and its documents are none of the longest."""
    course = plan_course(examples=700, batch_size=2, steps=350, epochs=None, seed=1)
    lengths = np.tile([200, 50], 350).astype(np.int32)
    for step in range(1, 351):
        lengths[course.batch(step)] = (150, 149) if step == 150 else (200, 50)

    assert shares_of(course, lengths, ranks=1).largest_micro_batch(512) == 299


def test_the_longest_document_is_among_what_is_looked_at():
    """Its step is neither one of the first nor one of the largest."""
    course = plan_course(examples=700, batch_size=2, steps=350, epochs=None, seed=1)
    lengths = np.full(700, 16_000, dtype=np.int32)
    lengths[course.batch(150)] = 30_000, 100

    assert shares_of(course, lengths, ranks=1).largest_micro_batch(16_384) == 30_000


def test_the_largest_step_is_found():
    course = plan_course(examples=4, batch_size=2, steps=3, epochs=None, seed=0)
    lengths = np.array([1, 10, 100, 1000], dtype=np.int32)

    found = shares_of(course, lengths, ranks=2).largest_step
    assert found == max(sum(int(lengths[i]) for i in course.batch(step)) for step in (1, 2, 3))


def test_what_memory_the_smaller_micro_batches_of_shares_leave_is_used():
    """On GPUs of 24 GB more layers keep their dequantised weights where micro-batches are no larger than shares."""
    course = course_of(64)
    tight = replace(gpu_named("rtx4090"), memory_gib=23.5)
    one, four = (forecast(replace(WORK, course=course), tight, Cluster(gpus=n)).memory for n in (1, 4))

    assert four.cut.micro_batch_tokens < one.cut.micro_batch_tokens
    assert four.cut.kept_layers > one.cut.kept_layers
    assert four.predicted_peak_bytes < tight.memory_gib * GIB


def test_a_small_share_is_planned_for_as_its_cut_allows():
    """An evaluation's passes are as one GPU's, of more tokens than such a step."""
    plan = planned(Shares(lengths=((958, 958),), ranks=2, largest_step=3806, all_seen=True))

    assert plan.cut.evaluation_tokens > 4 * plan.cut.micro_batch_tokens
    assert plan.peak_tokens == plan.cut.micro_batch_tokens == 2048


def test_a_plan_before_the_run_reckons_alike():
    one, two = (forecast(replace(WORK, course=course_of(256)), gpu_named("h200"), Cluster(gpus=n)) for n in (1, 2))

    assert two.memory.cut.evaluation_tokens == one.memory.cut.evaluation_tokens  # the same passes, to the bit
    assert two.memory.peak_tokens < 14_000
    assert one.memory.peak_tokens > 17_000
    assert two.memory.predicted_peak_bytes < 0.85 * one.memory.predicted_peak_bytes


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(st.integers(2, 9), st.integers(1, 300), st.sampled_from([512, 1024, 4096, 18_432]))
def test_no_micro_batch_of_a_step_that_was_looked_at_is_larger(ranks, size, budget):
    course = course_of(size, steps=4)
    found = shares_of(course, WORK.lengths, ranks=ranks).largest_micro_batch(budget)

    seen = []
    for step in range(1, 5):
        own = WORK.lengths[course.batch(step)].tolist()
        for places in deal(own, shares=ranks):
            lengths = [own[i] for i in places]
            seen += [sum(lengths[i] for i in pack) for pack in cut_share(lengths, budget)]
    assert max(seen) == found <= budget


def test_the_largest_of_many_steps_is_among_those_that_are_dealt():
    lengths = np.full(4000, 100, dtype=np.int32)
    lengths[WORK.course.batch(9)[0] % 4000] = 4000
    course = plan_course(examples=4000, batch_size=4, steps=900, epochs=None, seed=3)

    assert shares_of(course, lengths, ranks=2).largest_micro_batch(4096) == 4000


def test_a_share_is_cut_as_a_step_of_one_gpu_is():
    lengths = WORK.lengths[:200].tolist()

    assert cut_share(lengths, 4096) == pack_evenly(lengths, most=4096, grain=grain_of(4096))
    assert cut_share([5000, 10], 4096) == pack_evenly([5000, 10], most=5000, grain=grain_of(4096))
    assert cut_share([], 4096) == []


@given(st.integers(1, 4096))
def test_finer_sizes_hold_as_much_with_less_padding(tokens):
    coarse, fine = (padded_tokens(tokens, finely=finely) for finely in (False, True))

    assert tokens <= fine <= coarse
    assert fine - tokens < max(128, tokens / 8)
