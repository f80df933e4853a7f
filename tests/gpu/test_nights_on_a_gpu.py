"""Nights of a channel on a real GPU: judged there, and training is planned as if nothing had been loaded before.

python -m pytest tests/gpu/test_nights_on_a_gpu.py -s -rs
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
from job_process import call
from nightly_job import NightlyJob
from run_material import make_base

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def run(job, engine):
    job.outcome_file.unlink(missing_ok=True)
    options = [*job.command("run")[2:], "--device", "cuda", "--gpus", "1", "--engine", engine]
    ended = call(*options, outcome_file=job.outcome_file)
    assert ended.code == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
    return ended


@pytest.fixture(params=["fast", "generic"])
def engine(request):
    return request.param


def nightly(folder, base):
    job = NightlyJob(folder, base)
    job.recipe["lora"]["targets"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    job.recipe["evaluate"]["answers"] = 24
    return job


def test_two_nights_on_a_gpu(tmp_path, base, engine):
    job = nightly(tmp_path / "channel", base)
    run(job, engine)
    (first,) = job.reports().values()
    assert first["promotion"]["outcome"] == "promoted", first["promotion"]["said"]
    assert job.promoted()["run_id"] == first["run_id"]
    job.in_order()

    job.more("2", 40, seed=5)
    job.recipe["train"]["steps"] = 20
    ended = run(job, engine)
    (second,) = [report for report in job.reports().values() if report["run_id"] != first["run_id"]]
    phases = ended.phases()
    assert phases.index("test_before_training") < phases.index("train")
    assert ended.named("fresh_records")[0]["losses"].keys() == {first["run_id"]}
    assert not ended.named("judged_anew"), "the champion's results of its own night hold on the same device"
    assert second["promotion"]["judged"]["decision"]["champion"] == first["run_id"]
    assert not ended.named("asked_anew"), "nor is it asked again"
    assert second["promotion"]["judged"]["answers"]["examples"] == 24
    assert [each["champion"] for each in second["answers"]] == [each["tuned"] for each in first["answers"]]
    job.in_order()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_two_nights_on_two_gpus(tmp_path, base, engine, placement):
    """Rank 0 judges, and the champion is loaded before the second night trains."""
    job = nightly(tmp_path / "channel", base)
    job.recipe["promote"]["start_from"] = "promoted"
    options = ("--device", "cuda", "--gpus", "2", "--engine", engine, "--base-placement", placement)
    _, first = job.night(*options, cold=True)
    assert first["promotion"]["outcome"] == "promoted", first["promotion"]["said"]

    job.more("2", 40, seed=5)
    ended, second = job.night(*options, cold=True)
    assert ended.named("fresh_records")[0]["losses"].keys() == {first["run_id"]}
    assert len(ended.named("joined")) == 1
    assert (second["throughput"]["ranks"], second["throughput"]["placement"]) == (2, placement)
    assert second["promotion"]["judged"]["decision"]["champion"] == first["run_id"]
    assert second["evaluations"][0]["loss"] == pytest.approx(first["sweet_spot"]["loss"], rel=2e-2)
    job.in_order()


def test_what_was_loaded_before_training_takes_nothing_from_its_plan(tmp_path, base, engine):
    """Of the same data, with and without a channel: the batches are cut alike, and the adapter is the same."""
    with_channel, without = nightly(tmp_path / "channel", base), nightly(tmp_path / "plain", base)
    run(with_channel, engine)  # so that the next night loads a model before it trains
    for job in (with_channel, without):
        job.more("2", 40, seed=5)
    del without.recipe["promote"]
    plans, adapters = [], []
    for job in (with_channel, without):
        ended = run(job, engine)
        (planned,) = ended.named("plan")
        plans.append({name: planned[name] for name in ("micro_batch_tokens", "evaluation_tokens", "kept_layers")})
        report = max(job.reports().values(), key=lambda each: each["data"]["train"]["rows"])
        adapters.append(report["adapter"]["files"]["adapter_model.safetensors"]["sha256"])
    assert plans[0] == plans[1]
    assert adapters[0] == adapters[1]


def test_the_base_is_judged_with_its_adapter_switched_off(tmp_path, base, engine):
    """As it was judged at step 0 of the night that is compared with it."""
    job = nightly(tmp_path, base)
    run(job, engine)
    (report,) = job.reports().values()
    assert report["promotion"]["judged"]["champion_loss"] == pytest.approx(report["evaluations"][0]["loss"], abs=1e-4)
