"""The cut that fits the memory, and what follows when it runs out."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_2_7b import LLAMA_2_7B, one_step

from job.core.plan.cut import SHORT_TOKENS, Cut, after_out_of_memory, common_cut, is_same_arithmetic, plan_memory
from job.core.plan.memory import GIB, AdapterShape, DeviceMemory, memory_parts

steady = settings(deadline=None, derandomize=True, database=None)
TUTORIAL = AdapterShape(parameters=81_108_992, rank=32, optimizer="adamw_torch_fused")
engines = st.sampled_from(["fast", "generic"])
memories = st.integers(0, 200 * GIB)


def planned(free_bytes, *, engine="fast", max_length=512, step_tokens=50_000, kind="cuda", **others):
    device = DeviceMemory(kind=kind, name="H100", free_bytes=free_bytes)
    shares = one_step(step_tokens, max_length)
    return plan_memory(
        LLAMA_2_7B, TUTORIAL, engine=engine, device=device, max_length=max_length, shares=shares, **others
    )


def test_layers_that_are_not_compiled_keep_half_as_much_again():
    compiled, plain = (planned(79 * GIB, engine="generic", compiled=compiled) for compiled in (True, False))

    less, more = (memory_parts(LLAMA_2_7B, TUTORIAL, "generic", compiled=compiled) for compiled in (True, False))
    assert more.token_layer == pytest.approx(1.5 * less.token_layer, abs=1)
    assert plain.cut.micro_batch_tokens <= compiled.cut.micro_batch_tokens
    assert (plain.cut.compiled, compiled.cut.compiled, planned(79 * GIB).cut.compiled) == (False, True, False)


@steady
@given(engines, memories, st.integers(8, 4096), st.integers(1, 200_000))
def test_what_is_planned_fits_or_is_the_least_there_is(engine, free, max_length, step_tokens):
    plan = planned(free, engine=engine, max_length=max_length, step_tokens=step_tokens)

    assert plan.cut.micro_batch_tokens >= max_length
    assert plan.predicted_peak_bytes < free or (plan.cut.micro_batch_tokens, plan.cut.recomputed_layers) == (
        max_length,
        32,
    )
    if engine == "generic":
        assert plan.cut.kept_layers in {0, 32}
        assert plan.cut.recomputed_layers in {0, 32}


@steady
@given(engines, memories, memories)
def test_more_memory_never_means_computing_more_twice_for_the_same_micro_batch(engine, one, other):
    less, more = (planned(free, engine=engine) for free in sorted((one, other)))

    if less.cut.micro_batch_tokens == more.cut.micro_batch_tokens:
        assert less.cut.recomputed_layers >= more.cut.recomputed_layers
        assert less.cut.kept_layers <= more.cut.kept_layers


def test_the_generic_engine_keeps_dequantised_weights_where_its_layers_are_compiled():
    """A layer that is not compiled needs the memory for its activations."""
    compiled, plain = (planned(139 * GIB, engine="generic", compiled=compiled) for compiled in (True, False))

    assert (compiled.cut.kept_layers, plain.cut.kept_layers) == (32, 0)
    assert memory_parts(LLAMA_2_7B, TUTORIAL, "generic").dequantised_layer == 2 * LLAMA_2_7B.linear_parameters // 32


@pytest.mark.parametrize("gib", range(6, 140, 2))
def test_the_generic_engine_has_layers_of_one_kind(gib):
    plan = planned(gib * GIB, engine="generic", step_tokens=52_000)

    assert plan.cut.kept_layers in {0, 32}
    assert plan.cut.recomputed_layers in {0, 32}


def test_a_large_gpu_computes_nothing_twice():
    plan = planned(139 * GIB)

    assert (plan.cut.kept_layers, plan.cut.recomputed_layers) == (32, 0)
    assert plan.cut.micro_batch_tokens >= 16384


def test_forty_gibibytes_are_enough_for_nearly_the_same():
    plan = planned(40 * GIB)

    assert plan.cut.recomputed_layers == 0
    assert plan.cut.micro_batch_tokens >= 4096


@pytest.mark.parametrize("engine", ["fast", "generic"])
def test_a_small_gpu_trains_7b_with_recomputing(engine):
    plan = planned(8 * GIB, engine=engine)

    assert plan.cut.checkpointing
    assert plan.cut.micro_batch_tokens >= 1024


def test_a_small_step_is_one_micro_batch():
    assert planned(139 * GIB, step_tokens=1000).cut.micro_batch_tokens >= 1000


def test_when_memory_is_short_by_estimate_one_example_is_tried():
    plan = planned(4 * GIB)

    assert (plan.cut.micro_batch_tokens, plan.cut.checkpointing) == (512, True)
    assert "memory is short" in plan.reason


@steady
@given(engines, memories, st.integers(8, 4096))
def test_an_evaluation_s_pass_is_a_few_steps_wide_at_most(engine, free, max_length):
    plan = planned(free, engine=engine, max_length=max_length)

    assert plan.cut.micro_batch_tokens <= plan.cut.evaluation_tokens <= max(plan.cut.micro_batch_tokens, 16384)
    assert plan.cut.evaluation_tokens <= 4 * plan.cut.micro_batch_tokens


def test_on_the_cpu_the_memory_is_not_asked():
    assert planned(0, kind="cpu") == planned(100 * GIB, kind="cpu")


# --- memory ran out --------------------------------------------------------------------------------------------------

layers = st.integers(1, 80)
cuts = st.builds(
    Cut,
    engine=engines,
    micro_batch_tokens=st.integers(1, 60_000),
    evaluation_tokens=st.integers(1, 60_000),
    kept_layers=st.integers(0, 80),
    recomputed_layers=st.integers(0, 80),
    compiled=st.booleans(),
    device=st.just("H100"),
)
runs_out = st.sampled_from(["step", "evaluation"])


def size(cut):
    """What a cut takes of the memory, as far as that can shrink."""
    return cut.micro_batch_tokens, cut.evaluation_tokens, cut.kept_layers, -cut.recomputed_layers


@steady
@given(cuts, runs_out, st.integers(1, 60_000), layers)
def test_after_an_out_of_memory_the_cut_never_grows_and_it_always_ends(cut, during, longest, layers):
    for _ in range(64):
        smaller = after_out_of_memory(cut, during=during, longest=longest, layers=layers)
        if smaller is None:
            break
        assert all(new <= old for new, old in zip(size(smaller), size(cut), strict=True))
        assert size(smaller) != size(cut)
        assert (smaller.engine, smaller.compiled, smaller.device) == (cut.engine, cut.compiled, cut.device)
        cut = smaller
    assert smaller is None
    tokens = cut.micro_batch_tokens if during == "step" else cut.evaluation_tokens
    assert (tokens <= longest, cut.kept_layers) == (True, 0)
    assert cut.recomputed_layers >= layers


@steady
@given(cuts, runs_out, st.integers(1, 60_000), layers)
def test_what_costs_least_is_given_up_first(cut, during, longest, layers):
    smaller = after_out_of_memory(cut, during=during, longest=longest, layers=layers)
    tokens = cut.micro_batch_tokens if during == "step" else cut.evaluation_tokens
    if smaller is None:
        return
    changed = [new != old for new, old in zip(size(smaller), size(cut), strict=True)]
    assert sum(changed) == 1
    if smaller.kept_layers != cut.kept_layers:
        assert tokens <= max(longest, SHORT_TOKENS)  # no longer as long as products want them
    if smaller.recomputed_layers != cut.recomputed_layers:
        assert tokens <= longest
        assert not cut.kept_layers
    if cut.kept_layers and tokens > max(longest, SHORT_TOKENS):
        assert smaller.kept_layers == cut.kept_layers


@steady
@given(cuts, runs_out, st.integers(1, 60_000), layers)
def test_a_micro_batch_is_never_cut_below_one_example(cut, during, longest, layers):
    smaller = after_out_of_memory(cut, during=during, longest=longest, layers=layers)
    if smaller is not None:
        tokens = smaller.micro_batch_tokens if during == "step" else smaller.evaluation_tokens
        before = cut.micro_batch_tokens if during == "step" else cut.evaluation_tokens
        assert tokens >= min(longest, before)


def test_the_whole_way_down():
    cut = Cut(
        engine="fast",
        micro_batch_tokens=15_000,
        evaluation_tokens=16_384,
        kept_layers=20,
        recomputed_layers=3,
        compiled=False,
        device="H100",
        compute_dtype="bf16",
    )
    seen = []
    while cut is not None:
        seen.append((cut.micro_batch_tokens, cut.kept_layers, cut.recomputed_layers))
        cut = after_out_of_memory(cut, during="step", longest=1000, layers=32)

    assert seen == [
        *((15_000, 20, 3), (7500, 20, 3), (4096, 20, 3)),
        (4096, 0, 3),
        *((2048, 0, 3), (1024, 0, 3), (1000, 0, 3)),
        (1000, 0, 32),
    ]


@pytest.mark.parametrize(("dtype", "tokens"), [("bf16", 4096), ("fp32", 2048)])
def test_on_a_processor_activations_take_as_much_in_fp32_as_in_bf16(dtype, tokens):
    """Twice as many bytes each, half as many at once; but the longest example is never cut."""
    short, long = (
        plan_memory(
            LLAMA_2_7B,
            TUTORIAL,
            engine="generic",
            device=DeviceMemory(kind="cpu", name="CPU", free_bytes=0, compute_dtype=dtype),
            max_length=max_length,
            shares=one_step(50_000, max_length),
        )
        for max_length in (512, 8192)
    )

    assert (short.cut.micro_batch_tokens, short.cut.evaluation_tokens, long.cut.micro_batch_tokens) == (
        *(tokens, tokens),
        8192,
    )
    assert (short.cut.compute_dtype, "no instructions for bf16" in short.reason) == (dtype, dtype == "fp32")


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ({}, {}, True),
        ({"micro_batch_tokens": 64, "kept_layers": 1, "recomputed_layers": 1}, {}, True),
        ({"compiled": False}, {"compiled": True}, True),  # what is no longer compiled stays so
        ({"compiled": True}, {"compiled": False}, False),
        ({"device": "CPU, 2 threads"}, {}, False),
        ({"engine": "fast"}, {"engine": "generic"}, False),
        ({"compute_dtype": "fp32"}, {}, False),
    ],
)
def test_device_dtype_engine_and_compiled_code_make_the_arithmetic(before, now, same):
    cut = planned(79 * GIB, engine="generic").cut
    assert is_same_arithmetic(replace(cut, **before), replace(cut, **now)) is same


SIZES = st.tuples(st.integers(1, 9000), st.integers(1, 9000), st.integers(0, 4), st.integers(0, 4), st.booleans())


@given(st.lists(SIZES, min_size=1, max_size=5))
def test_the_cut_of_several_devices_asks_no_more_of_any_than_its_own(sizes):
    names = ("micro_batch_tokens", "evaluation_tokens", "kept_layers", "recomputed_layers", "compiled")
    first = planned(79 * GIB, engine="generic").cut
    cuts = [replace(first, **dict(zip(names, each, strict=True))) for each in sizes]
    common = common_cut(cuts)

    for cut in cuts:
        assert common.micro_batch_tokens <= cut.micro_batch_tokens
        assert common.evaluation_tokens <= cut.evaluation_tokens
        assert common.kept_layers <= cut.kept_layers
        assert common.recomputed_layers >= cut.recomputed_layers
        assert common.compiled <= cut.compiled
    assert common_cut([common, *cuts]) == common  # who settles for it settles for ever
    assert common_cut(cuts[:1]) == cuts[0]
