"""What is said of a run before there is a GPU."""

from dataclasses import replace

import numpy as np
import pytest
from llama_2_7b import LLAMA_2_7B, WORK

from job.core.data.lengths import candidates
from job.core.errors import CannotFitError, UsageError
from job.core.plan.course import plan_course
from job.core.plan.forecast import ask_for, forecast, trained_tokens
from job.core.plan.gpus import GPUS, gpu_called, gpu_named


def test_the_speed_on_an_h200_is_the_one_that_was_measured():
    found = forecast(WORK, gpu_named("h200"))

    assert found.tokens_per_second == pytest.approx(21_000, rel=0.02)  # 16k a micro-batch, weights kept
    assert found.training_seconds > trained_tokens(WORK) / found.tokens_per_second
    assert found.seconds == found.start_seconds + found.training_seconds


@pytest.mark.parametrize(("engine", "measured"), [("fast", 21_080), ("generic", 18_918)])
def test_the_speeds_on_an_h100_are_those_that_were_measured(engine, measured):
    found = forecast(replace(WORK, engine=engine, compiled=engine == "generic"), gpu_named("h100"))

    assert found.tokens_per_second == pytest.approx(measured, rel=0.02)


def test_power_and_memory_set_the_pace_beside_the_peak_rate():
    """An L4 has the higher peak of the two, at 72 W and half the memory bandwidth."""
    names = ["l4", "a10g", "rtx4090", "rtx5090", "l40s", "a100", "h100-pcie", "h100", "b200"]
    speeds = [forecast(WORK, gpu_named(name)).tokens_per_second for name in names]

    assert speeds == sorted(speeds)
    assert speeds[1] < speeds[-2] / 10
    assert {gpu.name for gpu in GPUS if gpu.speed.source == "measured"} == {"h100", "h200"}


@pytest.mark.parametrize(("engine", "measured"), [("fast", 1_250_000), ("generic", 550_000)])
def test_a_tiny_model_waits_for_the_host(engine, measured):
    sizes = {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "key_heads": 2, "head_width": 16}
    tiny = replace(LLAMA_2_7B, **sizes, linear_parameters=73_728, whole_parameters=4_096_320)
    adapter = replace(WORK.adapter, parameters=1_100_000)
    work = replace(WORK, shape=tiny, adapter=adapter, engine=engine, compiled=engine == "generic")
    h100, b200 = (forecast(work, gpu_named(name)).tokens_per_second for name in ("h100", "b200"))

    assert h100 == pytest.approx(measured, rel=0.05)
    assert b200 == pytest.approx(measured, rel=0.05)


def test_a_large_base_takes_longer_to_begin():
    large = replace(WORK, shape=replace(LLAMA_2_7B, layers=320, linear_parameters=64_760_053_760))

    assert 50 < forecast(WORK, gpu_named("h100")).start_seconds < 70  # 55 to 67 were measured
    assert forecast(large, gpu_named("h200")).start_seconds > 140


def test_less_memory_is_slower_and_still_fits():
    whole, part = forecast(WORK, gpu_named("h200")), forecast(WORK, gpu_named("h200", memory_gib=10))

    assert part.fits
    assert part.tokens_per_second < whole.tokens_per_second
    assert part.memory.predicted_peak_bytes < 10 * 2**30


def test_small_steps_are_slower_than_large_ones():
    small = replace(WORK, course=plan_course(examples=7000, batch_size=2, steps=100, epochs=None, seed=0))
    h200 = gpu_named("h200")

    assert forecast(small, h200).tokens_per_second < 0.9 * forecast(WORK, h200).tokens_per_second


@pytest.mark.parametrize(("batch", "measured"), [(2, 11_804), (16, 18_170)])
def test_the_speed_of_small_steps_on_an_h100_is_near_what_was_measured(batch, measured):
    """Medians of GSM8K. Much of a small step does not depend on its tokens; what waits for the host is left out."""
    small = replace(WORK, course=plan_course(examples=7000, batch_size=batch, steps=100, epochs=None, seed=0))
    found = forecast(small, gpu_named("h100")).tokens_per_second

    assert measured < found < 1.2 * measured


def test_an_update_costs_what_is_trained_passes_the_memory():
    one, twice = (replace(WORK.adapter, parameters=number * WORK.adapter.parameters) for number in (1, 2))
    course = plan_course(examples=7000, batch_size=2, steps=100, epochs=None, seed=0)
    speeds = [
        forecast(replace(WORK, adapter=adapter, course=course), gpu_named("h100")).tokens_per_second
        for adapter in (one, twice)
    ]

    assert speeds[1] < 0.9 * speeds[0]


def test_layers_that_are_not_compiled_need_more_memory():
    compiled, plain = (replace(WORK, engine="generic", compiled=compiled) for compiled in (True, False))
    small = gpu_named("h100", memory_gib=40)

    assert forecast(plain, small).parts.token_layer == pytest.approx(1.5 * forecast(compiled, small).parts.token_layer)
    assert forecast(plain, small).memory.predicted_peak_bytes < 40 * 2**30
    assert (forecast(plain, small).memory.cut.compiled, forecast(compiled, small).memory.cut.compiled) == (False, True)
    assert ask_for(plain).gpu_memory_gib >= ask_for(compiled).gpu_memory_gib


def test_a_gpu_that_is_too_small_is_said_to_be():
    assert not forecast(WORK, gpu_named("l4", memory_gib=4)).fits


def test_every_known_gpu_trains_7b():
    assert all(forecast(WORK, gpu).fits for gpu in GPUS)


@pytest.mark.parametrize("name", ["v100", "t4"])
def test_a_gpu_without_bf16_is_refused(name):
    with pytest.raises(CannotFitError, match=f"{name} has no bf16"):
        gpu_named(name)


@pytest.mark.parametrize("name", ["mi300x", "mi250", "gaudi2"])
def test_what_is_no_nvidia_gpu_is_refused_with_the_reason(name):
    with pytest.raises(CannotFitError, match=f"{name} is no NVIDIA GPU: the 4-bit weights"):
        gpu_named(name)


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"h900: not known; one of h200, .*l4, or --gpu-memory"):
        gpu_named("h900")


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_driver_s_name_is_a_kind_of_the_plan(gpu):
    assert gpu.driver_name.startswith("NVIDIA ")
    assert gpu_called(gpu.driver_name) is gpu


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "CPU, 2 threads",
        "",
    ],
)
def test_a_card_of_another_power_and_a_part_of_one_are_no_kind_of_the_plan(name):
    assert gpu_called(name) is None


def test_each_candidate_says_what_it_cuts():
    lengths = np.array([100, 200, 300, 400], dtype=np.int32)
    found = {each.tokens: each for each in candidates(lengths, chosen=320, positions=4096)}

    assert list(found) == [128, 256, 320, 512]
    assert (found[256].examples_over, found[256].share_cut) == (2, pytest.approx(188 / 1000))
    assert found[512].share_cut == 0
    assert found[256].targets_cut is None
    assert 512 not in {each.tokens for each in candidates(lengths, chosen=320, positions=256)}


def test_a_candidate_s_share_of_targets_is_counted_apart_from_that_of_tokens():
    """The last tenth of each example is learned: what a cut takes first."""
    lengths = np.array([100, 200, 300, 400], dtype=np.int64)
    within = {400: 100, 320: 62, 256: 30, 128: 10}
    found = {
        each.tokens: each.targets_cut
        for each in candidates(lengths, chosen=320, positions=400, targets=lambda limit: within[limit])
    }

    assert found == {320: pytest.approx(0.38), 256: pytest.approx(0.7), 128: pytest.approx(0.9)}


def test_a_base_takes_of_the_disk_what_its_files_do():
    """gpt-oss-20b's are a third of what its weights would be in bf16."""
    in_bf16 = ask_for(WORK)
    smaller = ask_for(replace(WORK, base_bytes=4 * 2**30))
    assert in_bf16.disk_gib - smaller.disk_gib == pytest.approx(2 * WORK.shape.parameters / 2**30 - 4, abs=4)
    assert smaller.gpu_memory_gib == in_bf16.gpu_memory_gib


def test_what_to_ask_for_covers_base_and_checkpoints():
    ask = ask_for(WORK)

    assert ask.host_memory_gib >= 18
    assert ask.disk_gib >= 12.6 + 3.6 + 4 * 0.6  # the base in bf16 and in 4 bits, four checkpoints
    assert 6 <= ask.gpu_memory_gib <= 12
