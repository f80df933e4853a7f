"""The work of a token, and its share of what a GPU sustains."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_2_7b import LENGTHS, LLAMA_2_7B, WORK
from mixture_shapes import GPT_OSS_20B, QWEN3_30B_A3B

from job.core.plan.ceiling import flops_per_token, share_of_ceiling
from job.core.plan.gpus import GPUS, gpu_named
from job.core.plan.memory import AdapterShape

SHORTER = np.random.default_rng(0).integers(78, 228, 7000).astype(np.int32)  # GSM8K by tokens of its own: 153
SPEEDS = st.sampled_from([gpu.speed for gpu in GPUS])
RATES = st.floats(1, 1e6)


def work_of(shape=LLAMA_2_7B, adapter=WORK.adapter, *, lengths=LENGTHS, targets=WORK.targets):
    return flops_per_token(shape, adapter, lengths=lengths, targets=targets)


def test_the_work_of_a_token_is_counted_as_when_it_was_measured():
    """685.7 TFLOP/s were 25.3 thousand tokens a second, of this model on these lengths."""
    assert 685.7e12 / work_of() == pytest.approx(25_300, rel=0.01)


def test_tokens_without_a_loss_never_reach_the_head():
    assert work_of(targets=WORK.targets // 2) < work_of()


def test_of_experts_those_count_that_a_token_goes_through():
    every = replace(QWEN3_30B_A3B, experts=replace(QWEN3_30B_A3B.experts, chosen=128))
    others = QWEN3_30B_A3B.experts.parameters * 15 / 16

    assert work_of(every) - work_of(QWEN3_30B_A3B) == pytest.approx(4 * others)


@pytest.mark.parametrize(
    ("shape", "adapter", "lengths", "rate", "benched"),
    [
        (LLAMA_2_7B, WORK.adapter.parameters, LENGTHS, 21_356, 0.855),
        (QWEN3_30B_A3B, 26_738_688, SHORTER, 18_392, 0.338),
        (GPT_OSS_20B, 15_925_248, SHORTER, 22_148, 0.477),
    ],
    ids=["llama2-7b", "qwen3-30b-a3b", "gpt-oss-20b"],
)
def test_the_share_is_near_that_of_the_benches_on_an_h200(shape, adapter, lengths, rate, benched):
    """Which measured the ceiling in the same run: 677 to 680 TFLOP/s."""
    trained = AdapterShape(parameters=adapter, rank=32, optimizer="adamw_8bit")
    flops = work_of(shape, trained, lengths=lengths, targets=int(lengths.sum()))
    share = share_of_ceiling(gpu_named("h200").speed, tokens_per_second=rate, flops=flops)

    assert share == pytest.approx(benched, rel=0.015)


@given(SPEEDS, RATES, st.floats(1.5, 100))
def test_the_share_is_proportional_to_the_rate_and_to_the_work_of_a_token(speed, rate, times):
    share = share_of_ceiling(speed, tokens_per_second=rate, flops=1e10)

    assert share_of_ceiling(speed, tokens_per_second=times * rate, flops=1e10) == pytest.approx(times * share)
    assert share_of_ceiling(speed, tokens_per_second=rate, flops=times * 1e10) == pytest.approx(times * share)
    assert share_of_ceiling(speed, tokens_per_second=speed.sustained_flops / 1e10, flops=1e10) == pytest.approx(1)
