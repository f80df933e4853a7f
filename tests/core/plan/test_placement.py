"""Where a base goes: whole on each GPU where it fits, else in shards; what is asked for is done or refused."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_2_7b import LLAMA_2_7B, one_step

from job.core.errors import UsageError
from job.core.plan.cut import least_bytes, plan_memory
from job.core.plan.memory import GIB, AdapterShape, DeviceMemory, memory_parts
from job.core.plan.placement import place, refuse_shards_of_one

steady = settings(deadline=None, derandomize=True, database=None)
LLAMA_2_70B = replace(
    LLAMA_2_7B,
    layers=80,
    hidden=8192,
    intermediate=28672,
    heads=64,
    key_heads=8,
    linear_parameters=68_451_041_280,
    whole_parameters=525_607_936,
)
ADAPTER = AdapterShape(parameters=414_187_520, rank=32, optimizer="adamw_torch_fused")


def placed(free_gib, *, shape=LLAMA_2_70B, ranks=2, wanted=None, against=None, kind="cuda", engine="fast"):
    return place(
        shape,
        ADAPTER,
        engine=engine,
        device=DeviceMemory(kind=kind, name="a GPU", free_bytes=int(free_gib * GIB)),
        max_length=512,
        ranks=ranks,
        wanted=wanted,
        against=against,
    )


@pytest.mark.parametrize(("free_gib", "placement"), [(139, "replicated"), (78, "replicated"), (38, "sharded")])
def test_a_base_that_one_gpu_holds_is_replicated_and_one_that_none_holds_is_sharded(free_gib, placement):
    found = placed(free_gib)

    assert found.placement == placement
    assert "GiB to hold the whole base" in found.reason


@steady
@given(st.integers(1, 200), st.integers(1, 8), st.sampled_from(["fast", "generic"]))
def test_it_is_sharded_only_where_that_is_the_only_way_and_then_always(free_gib, ranks, engine):
    found = placed(free_gib, ranks=ranks, engine=engine)
    whole = least_bytes(LLAMA_2_70B, ADAPTER, engine=engine, max_length=512, shards=1)

    assert (found.placement == "sharded") == (ranks > 1 and free_gib * GIB < whole)
    if found.placement == "sharded":
        assert least_bytes(LLAMA_2_70B, ADAPTER, engine=engine, max_length=512, shards=ranks) < whole


def test_what_is_asked_for_is_done():
    assert placed(139, wanted="sharded").placement == "sharded"
    assert placed(20, wanted="replicated").placement == "replicated"


def test_a_base_that_cannot_be_sharded_is_replicated_or_refused():
    found = placed(38, against="its layers share their weights")

    assert found.placement == "replicated"
    assert "share their weights" in found.reason
    with pytest.raises(UsageError, match="share their weights"):
        placed(38, wanted="sharded", against="its layers share their weights")


def test_one_gpu_has_nobody_to_share_with():
    assert placed(20, ranks=1).placement == "replicated"
    assert placed(20, kind="cpu").placement == "replicated"
    refuse_shards_of_one("replicated")
    for wanted in (lambda: placed(20, ranks=1, wanted="sharded"), lambda: refuse_shards_of_one("sharded")):
        with pytest.raises(UsageError, match="nothing to spread the base over"):
            wanted()


@steady
@given(st.integers(2, 64), st.sampled_from(["fast", "generic"]))
def test_a_share_of_the_base_and_two_layers_are_what_a_gpu_holds(shards, engine):
    whole, part = (memory_parts(LLAMA_2_70B, ADAPTER, engine, shards=each) for each in (1, shards))

    assert part.weights == pytest.approx(whole.weights * (1 / shards + 2 / 80), abs=2)
    assert part.dequantised_layer == 0
    assert (part.embeddings, part.workspace, part.token_layer) == (
        whole.embeddings,
        whole.workspace,
        whole.token_layer,
    )


@pytest.mark.parametrize("engine", ["fast", "generic"])
def test_the_plan_of_a_sharded_base_keeps_no_weights_dequantised_and_fits_where_the_whole_does_not(engine):
    def planned(free_gib, shards):
        return plan_memory(
            LLAMA_2_70B,
            ADAPTER,
            engine=engine,
            device=DeviceMemory(kind="cuda", name="a GPU", free_bytes=free_gib * GIB),
            max_length=512,
            shares=one_step(50_000),
            shards=shards,
        )

    assert planned(38, 1).predicted_peak_bytes > 38 * GIB
    assert planned(38, 4).predicted_peak_bytes < 38 * GIB
    for free_gib in (38, 139, 500):
        assert planned(free_gib, 4).cut.kept_layers == 0
    assert planned(500, 1).cut.kept_layers == 80
