"""What training needs of a GPU's memory, and the cut that fits."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_2_7b import LLAMA_2_7B

from job.core.cut import plan_memory
from job.core.memory import AdapterShape, DeviceMemory, memory_parts

steady = settings(deadline=None, derandomize=True, database=None)
GIB = 2**30
TUTORIAL = AdapterShape(parameters=81_108_992, rank=32, optimizer="adamw_torch_fused")
EIGHT_BIT = replace(TUTORIAL, optimizer="adamw_8bit")
MISTRAL_7B = replace(LLAMA_2_7B, vocabulary=32768, intermediate=14336, key_heads=8)
paths = st.sampled_from(["fast", "generic"])
memories = st.integers(0, 200 * GIB)


def planned(free_bytes, *, path="fast", max_length=512, step_tokens=50_000, kind="cuda", **others):
    device = DeviceMemory(kind=kind, free_bytes=free_bytes)
    return plan_memory(
        LLAMA_2_7B, TUTORIAL, path=path, device=device, max_length=max_length, step_tokens=step_tokens, **others
    )


def test_a_shape_counts_its_parameters():
    assert LLAMA_2_7B.parameters == pytest.approx(6_738_415_616, rel=1e-4)  # without the norms


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
def test_the_generic_path_s_peak_is_the_one_that_was_measured(tokens, measured):
    """On an H200, compiled, by a prototype that kept no copy of the adapter; GiB."""
    parts = memory_parts(LLAMA_2_7B, TUTORIAL, "generic")
    peak = parts.peak(layers=32, tokens=tokens, kept_layers=0, recomputed_layers=0) - parts.update

    assert peak / GIB == pytest.approx(measured, rel=0.03)


def test_the_generic_path_s_peak_is_the_one_that_the_job_took():
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
def test_the_fast_path_s_peak_is_the_one_that_the_job_took(tokens, recomputed, measured):
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


@pytest.mark.parametrize("path", ["fast", "generic"])
def test_no_layer_decodes_into_the_workspace_when_all_keep_their_weights(path):
    parts = memory_parts(LLAMA_2_7B, EIGHT_BIT, path)
    some, every = (
        parts.peak(layers=32, tokens=4096, kept_layers=kept, recomputed_layers=0) - kept * parts.dequantised_layer
        for kept in (31, 32)
    )

    assert some - every == parts.spared_workspace <= parts.workspace


def test_layers_that_are_not_compiled_keep_half_as_much_again():
    compiled, plain = (planned(79 * GIB, path="generic", compiled=compiled) for compiled in (True, False))

    less, more = (memory_parts(LLAMA_2_7B, TUTORIAL, "generic", compiled=compiled) for compiled in (True, False))
    assert more.token_layer == pytest.approx(1.5 * less.token_layer, abs=1)
    assert plain.micro_batch_tokens <= compiled.micro_batch_tokens
    assert (plain.cut["compiled"], compiled.cut["compiled"], planned(79 * GIB).cut["compiled"]) == (False, True, False)


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
    assert parts.embeddings == 2 * 2 * 32000 * 4096
    assert parts.adapter == parts.gradients == parts.update == 4 * TUTORIAL.parameters
    assert parts.optimizer == 8 * TUTORIAL.parameters
    assert parts.dequantised_layer >= 2 * LLAMA_2_7B.linear_parameters // 32


@steady
@given(paths, memories, st.integers(8, 4096), st.integers(1, 10**6))
def test_what_is_planned_fits_or_is_the_least_there_is(path, free, max_length, step_tokens):
    plan = planned(free, path=path, max_length=max_length, step_tokens=step_tokens)

    assert plan.micro_batch_tokens >= max_length
    assert plan.predicted_peak_bytes < free or (plan.micro_batch_tokens, plan.recomputed_layers) == (max_length, 32)
    if path == "generic":
        assert plan.kept_layers in {0, 32}
        assert plan.recomputed_layers in {0, 32}


@steady
@given(paths, memories, memories)
def test_more_memory_never_means_computing_more_twice_for_the_same_micro_batch(path, one, other):
    less, more = (planned(free, path=path) for free in sorted((one, other)))

    if less.micro_batch_tokens == more.micro_batch_tokens:
        assert less.recomputed_layers >= more.recomputed_layers
        assert less.kept_layers <= more.kept_layers


def test_the_generic_path_keeps_decoded_weights_where_its_layers_are_compiled():
    """A layer that is not compiled needs the memory for its activations."""
    compiled, plain = (planned(139 * GIB, path="generic", compiled=compiled) for compiled in (True, False))

    assert (compiled.kept_layers, plain.kept_layers) == (32, 0)
    assert memory_parts(LLAMA_2_7B, TUTORIAL, "generic").dequantised_layer == 2 * LLAMA_2_7B.linear_parameters // 32


@pytest.mark.parametrize("gib", range(6, 140, 2))
def test_the_generic_path_has_layers_of_one_kind(gib):
    plan = planned(gib * GIB, path="generic", step_tokens=52_000)

    assert plan.kept_layers in {0, 32}
    assert plan.recomputed_layers in {0, 32}


def test_a_large_gpu_computes_nothing_twice():
    plan = planned(139 * GIB)

    assert (plan.kept_layers, plan.recomputed_layers) == (32, 0)
    assert plan.micro_batch_tokens >= 16384


def test_forty_gibibytes_are_enough_for_nearly_the_same():
    plan = planned(40 * GIB)

    assert plan.recomputed_layers == 0
    assert plan.micro_batch_tokens >= 4096


@pytest.mark.parametrize("path", ["fast", "generic"])
def test_a_small_gpu_trains_7b_with_recomputing(path):
    plan = planned(8 * GIB, path=path)

    assert plan.checkpointing
    assert plan.micro_batch_tokens >= 1024


def test_a_small_step_is_one_micro_batch():
    assert planned(139 * GIB, step_tokens=1000).micro_batch_tokens >= 1000


def test_when_memory_is_short_by_estimate_one_example_is_tried():
    plan = planned(4 * GIB)

    assert (plan.micro_batch_tokens, plan.checkpointing) == (512, True)
    assert "memory is short" in plan.reason


@steady
@given(paths, memories, st.integers(8, 4096))
def test_an_evaluation_s_pass_is_a_few_steps_wide_at_most(path, free, max_length):
    plan = planned(free, path=path, max_length=max_length)

    assert plan.micro_batch_tokens <= plan.evaluation_tokens <= max(plan.micro_batch_tokens, 16384)
    assert plan.evaluation_tokens <= 4 * plan.micro_batch_tokens


def test_on_the_cpu_the_memory_is_not_asked():
    assert planned(0, kind="cpu") == planned(100 * GIB, kind="cpu")
