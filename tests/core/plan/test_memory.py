"""What training needs of a GPU's memory, part by part."""

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from llama_2_7b import LLAMA_2_7B
from mixture_shapes import GPT_OSS_20B, QWEN3_30B_A3B

from job.core.plan.memory import GIB, OPTIMIZER_BYTES, AdapterShape, memory_parts
from job.core.recipe.schema import Optimizer

steady = settings(deadline=None, derandomize=True, database=None)
TUTORIAL = AdapterShape(parameters=81_108_992, rank=32, optimizer="adamw_torch_fused")
EIGHT_BIT = replace(TUTORIAL, optimizer="adamw_8bit")
MISTRAL_7B = replace(
    LLAMA_2_7B,
    vocabulary=32768,
    intermediate=14336,
    key_heads=8,
    linear_parameters=6_979_321_856,
    whole_parameters=268_701_696,
)
LLAMA_3_1_8B = replace(MISTRAL_7B, vocabulary=128256, whole_parameters=1_050_939_392)
GEMMA_3_12B = replace(
    LLAMA_2_7B,
    layers=48,
    hidden=3840,
    intermediate=15360,
    vocabulary=262208,
    heads=16,
    key_heads=8,
    head_width=256,
    linear_parameters=10_759_372_800,
    whole_parameters=1_007_644_416,
    norms=4,
)
engines = st.sampled_from(["fast", "generic"])
memories = st.integers(0, 200 * GIB)


def test_a_shape_counts_its_parameters():
    assert LLAMA_2_7B.parameters == 6_738_415_616


@pytest.mark.parametrize(
    ("tokens", "kept", "measured"),
    [
        *((4096, 0, 17.4), (8192, 0, 29.2), (16384, 0, 52.9), (24576, 0, 76.6), (32768, 0, 100.3)),
        *((2048, 32, 23.4), (4096, 32, 29.3), (16384, 32, 64.9), (32768, 32, 112.3)),
    ],
)
def test_the_peak_is_the_one_that_was_measured(tokens, kept, measured):
    """On an H200, by a prototype of the step that kept no copy of the adapter; GiB."""
    parts = memory_parts(LLAMA_2_7B, TUTORIAL, "fast")
    peak = parts.peak(layers=32, tokens=tokens, kept_layers=kept, recomputed_layers=0) - parts.update

    assert peak / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(("tokens", "measured"), [(8192, 37.7), (16384, 70.1)])
def test_the_generic_engine_s_peak_is_the_one_that_was_measured(tokens, measured):
    """On an H200, compiled, by a prototype that kept no copy of the adapter; GiB."""
    parts = memory_parts(LLAMA_2_7B, TUTORIAL, "generic")
    peak = parts.peak(layers=32, tokens=tokens, kept_layers=0, recomputed_layers=0) - parts.update

    assert peak / GIB == pytest.approx(measured, rel=0.03)


def test_the_generic_engine_s_peak_is_the_one_that_the_job_took():
    """On an H100, compiled: 58.9 GiB."""
    parts = memory_parts(LLAMA_2_7B, EIGHT_BIT, "generic")
    peak = parts.peak(layers=32, tokens=13_312, kept_layers=0, recomputed_layers=0)

    assert peak / GIB == pytest.approx(58.9, rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "recomputed", "measured"),
    [
        *((4079, 0, 17.12), (8147, 0, 28.66), (16345, 0, 52.40)),
        *((4079, 16, 11.89), (8147, 16, 18.24), (16345, 16, 31.49), (32762, 16, 57.94)),
        *((4079, 32, 6.95), (8147, 32, 8.48), (16345, 32, 11.88), (32762, 32, 18.68)),
    ],
)
def test_the_fast_engine_s_peak_is_the_one_that_the_job_took(tokens, recomputed, measured):
    """On an H100, Llama-2-7B; GiB."""
    parts = memory_parts(LLAMA_2_7B, EIGHT_BIT, "fast")
    peak = parts.peak(layers=32, tokens=tokens, kept_layers=0, recomputed_layers=recomputed)

    assert peak / GIB == pytest.approx(measured, rel=0.025)


@pytest.mark.parametrize(
    ("tokens", "recomputed", "measured"),
    [(4079, 0, 17.67), (16345, 0, 53.59), (8147, 16, 18.90), (32762, 16, 59.57), (8147, 32, 9.00), (32762, 32, 19.84)],
)
def test_another_shape_s_peak_too(tokens, recomputed, measured):
    """On an H100, Mistral-7B, whose keys have a quarter of the heads; GiB."""
    of_layers = 32 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    adapter = replace(EIGHT_BIT, parameters=of_layers + 32 * (4096 + 32768))
    parts = memory_parts(MISTRAL_7B, adapter, "fast")
    peak = parts.peak(layers=32, tokens=tokens, kept_layers=0, recomputed_layers=recomputed)

    assert peak / GIB == pytest.approx(measured, rel=0.025)


def test_the_generic_engine_s_peak_where_layers_have_four_norms():
    """On an H200, compiled, Gemma-3-12B with all decoded weights kept: 110.3 GiB."""
    parts = memory_parts(GEMMA_3_12B, replace(EIGHT_BIT, parameters=130_940_928), "generic")
    peak = parts.peak(layers=48, tokens=11_264, kept_layers=48, recomputed_layers=0)

    assert peak / GIB == pytest.approx(110.3, rel=0.03)


def test_the_peak_where_linear_layers_are_peft_s_own():
    """On an H200, Llama-3.1-8B: 86.9 GiB."""
    adapter = replace(EIGHT_BIT, parameters=83_886_080, by_peft=True)
    parts = memory_parts(LLAMA_3_1_8B, adapter, "generic", compiled=False)
    peak = parts.peak(layers=32, tokens=9_216, kept_layers=0, recomputed_layers=0)

    assert peak / GIB == pytest.approx(86.9, rel=0.03)


@pytest.mark.parametrize(
    ("shape", "trained", "measured"), [(GPT_OSS_20B, 15_925_248, 62.8), (QWEN3_30B_A3B, 26_738_688, 98.6)]
)
def test_the_peak_of_a_mixture_is_the_one_that_the_job_took(shape, trained, measured):
    """On an H200, in micro-batches of at most 21,504 tokens, of which the largest step had fewer; GiB."""
    parts = memory_parts(shape, replace(EIGHT_BIT, parameters=trained), "generic", compiled=False)
    peak = parts.peak(layers=shape.layers, tokens=21_504, kept_layers=0, recomputed_layers=0)

    assert measured < peak / GIB < 1.05 * measured


@pytest.mark.parametrize("engine", ["fast", "generic"])
def test_no_layer_dequantises_into_the_workspace_when_all_keep_their_weights(engine):
    parts = memory_parts(LLAMA_2_7B, EIGHT_BIT, engine)
    some, every = (
        parts.peak(layers=32, tokens=4096, kept_layers=kept, recomputed_layers=0) - kept * parts.dequantised_layer
        for kept in (31, 32)
    )

    assert some - every == parts.spared_workspace <= parts.workspace


def test_a_large_vocabulary_needs_more_only_where_autograd_goes_through_the_logits():
    """Gemma 2's, whose logits are bounded."""

    def logits(kind, vocabulary):
        shape = replace(LLAMA_2_7B, vocabulary=vocabulary, logits=kind)
        return memory_parts(shape, TUTORIAL, "generic").logits

    assert logits("plain", 256_000) == logits("plain", 32_000) == 2**28
    assert logits("capped", 256_000) == 4 * 4 * 1024 * 256_000
    assert logits("scaled", 256_000) == 3 * 4 * 1024 * 256_000


def test_each_part_is_counted():
    parts = memory_parts(LLAMA_2_7B, TUTORIAL, "fast")

    assert parts.weights / GIB == pytest.approx(3.11, abs=0.02)
    assert parts.embeddings == 2 * (2 * 32000 * 4096 + 65 * 4096)  # and the norms
    assert parts.adapter == parts.gradients == parts.update == 4 * TUTORIAL.parameters
    assert parts.optimizer == 8 * TUTORIAL.parameters
    assert parts.dequantised_layer >= 2 * LLAMA_2_7B.linear_parameters // 32


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_every_optimizer_of_the_recipe_has_its_bytes(optimizer):
    assert optimizer in OPTIMIZER_BYTES


def test_no_bytes_are_planned_for_an_optimizer_that_no_recipe_names():
    assert {*OPTIMIZER_BYTES} == {*get_args(Optimizer)}
