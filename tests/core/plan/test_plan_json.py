"""A plan for scripts."""

import json
from dataclasses import replace

import pytest
from llama_2_7b import WORK
from report_fixtures import DATA

from job.core.data.lengths import candidates
from job.core.plan.forecast import forecast
from job.core.plan.gpus import Gpu, gpu_named
from job.core.plan.plan_json import plan_json
from job.core.plan.scaling import ALONE, cluster_of


def printed(*gpus, usd_per_hour=None, work=WORK, cluster=ALONE):
    each = candidates(work.lengths, chosen=DATA.max_length, positions=4096)
    found = plan_json(DATA, each, work, [forecast(work, gpu, cluster) for gpu in gpus], usd_per_hour=usd_per_hour)
    return json.loads(found.model_dump_json())


def test_it_holds_the_numbers_of_the_plan():
    found = printed(gpu_named("h100"), usd_per_hour=4)
    there = forecast(WORK, gpu_named("h100"))

    assert list(found) == ["data", "work", "forecasts", "ask"]
    assert found["data"]["length_tokens"]["p50"] == 40
    assert (found["data"]["max_length_tokens"], found["data"]["max_length_reason"]) == (64, DATA.max_length_reason)
    assert [each["tokens"] for each in found["data"]["candidates"]] == [64, 128, 256, 512]
    assert (found["work"]["steps"], found["work"]["batch_size"]) == (28, 256)
    assert (found["work"]["trained_parameters"], found["work"]["engine"]) == (81_108_992, "fast")
    (h100,) = found["forecasts"]
    assert (h100["name"], h100["memory_gib"], h100["fits"]) == ("h100", 79.2, True)
    assert h100["predicted_peak_bytes"] == there.memory.predicted_peak_bytes
    assert h100["micro_batch_tokens"] == there.memory.cut.micro_batch_tokens
    assert (h100["kept_layers"], h100["recomputed_layers"]) == (32, 0)
    assert h100["tokens_per_second"] == there.tokens_per_second
    assert h100["usd"] == 4 * h100["seconds"] / 3600
    assert set(found["ask"]) == {"gpus", "nodes", "gpu_memory_gib", "host_memory_gib", "disk_gib"}
    assert (h100["gpus"], h100["placement"], h100["link"]) == (1, "replicated", "NVLink 4")
    assert h100["tokens_per_second_a_gpu"] == h100["tokens_per_second"]
    assert (h100["times_one_gpu"], h100["exchange_seconds_a_step"], h100["network_gbit_per_second"]) == (None,) * 3
    assert h100["sent_bytes_a_step"] == 0


def test_several_gpus_are_said_with_what_they_exchange_and_cost():
    cluster = cluster_of(gpus=4, nodes=2, gigabits=200)
    found = printed(gpu_named("h100"), usd_per_hour=4, cluster=cluster)
    (h100,), one = found["forecasts"], printed(gpu_named("h100"))["forecasts"][0]

    assert (h100["gpus"], h100["network_gbit_per_second"]) == (8, 200)
    assert h100["tokens_per_second_a_gpu"] == h100["tokens_per_second"] / 8
    assert 5 < h100["times_one_gpu"] < 8
    assert h100["tokens_per_second"] == pytest.approx(one["tokens_per_second"] * h100["times_one_gpu"], rel=0.01)
    assert h100["busiest_share"] >= 1
    assert h100["sent_bytes_a_step"] == pytest.approx(2 * 7 / 8 * 4 * 81_108_992, rel=1e-4)
    assert 0 < h100["exchange_seconds_a_step"] < 0.1
    assert h100["usd"] == 8 * 4 * h100["seconds"] / 3600
    assert (found["ask"]["gpus"], found["ask"]["nodes"]) == (4, 2)
    assert found["ask"]["host_memory_gib"] > 3 * 8


def test_a_price_of_nothing_is_a_price_and_none_is_none():
    assert printed(gpu_named("h100"), usd_per_hour=0)["forecasts"][0]["usd"] == 0
    assert printed(gpu_named("h100"))["forecasts"][0]["usd"] is None


def test_a_gpu_that_is_too_small_has_no_time_and_no_cost():
    """It would look like the cheapest."""
    small, unknown = printed(
        gpu_named("l4", memory_gib=4), Gpu(name="x", memory_gib=40, speed=None, link=None), usd_per_hour=4
    )["forecasts"]

    assert (small["fits"], unknown["fits"]) == (False, True)
    for each in (small, unknown):
        assert (each["tokens_per_second"], each["seconds"], each["usd"]) == (None, None, None)
    (small,) = printed(gpu_named("l4", memory_gib=4), cluster=cluster_of(gpus=2, nodes=1, gigabits=100))["forecasts"]
    assert (small["times_one_gpu"], small["tokens_per_second_a_gpu"], small["busiest_share"]) == (None, None, None)


def test_the_engine_and_whether_it_is_compiled_are_said():
    work = printed(gpu_named("h100"), work=replace(WORK, engine="generic", compiled=True))["work"]

    assert (work["engine"], work["compiled"]) == ("generic", True)
