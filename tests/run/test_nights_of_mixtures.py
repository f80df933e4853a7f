"""A channel whose models are mixtures with adapters on their experts: the champion is loaded, scored and trained on."""

import shutil

import pytest
from nightly_job import NightlyJob
from tiny_families import write_family


def test_a_champion_with_experts_is_judged_anew_and_trained_on(tmp_path, base, warm):
    folder = tmp_path / "mixture"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    job = NightlyJob(tmp_path / "job", write_family(folder, "qwen3_moe"), warm)
    job.recipe["lora"] = {"r": 4, "alpha": 8, "targets": ["all-linear", "experts"]}
    job.recipe["promote"]["start_from"] = "promoted"
    _, first = job.night()
    assert first["promotion"]["outcome"] == "promoted", first["promotion"]["said"]

    job.more("2", 12, seed=5)
    shutil.rmtree(job.channel / "results")  # what is not kept is found by loading
    ended, second = job.night()
    assert second["promotion"]["parent"]["run_id"] == first["run_id"]
    assert [each["losses"].keys() for each in ended.named("fresh_records")] == [{first["run_id"]}]
    assert first["run_id"] in {each["model"] for each in ended.named("judged_anew")}
    judged = second["promotion"]["judged"]
    assert judged["champion_loss"] == pytest.approx(first["adapter"]["proven_loss"], rel=1e-4)
    assert second["evaluations"][0]["loss"] == pytest.approx(first["adapter"]["proven_loss"], rel=1e-4)
    assert not [note for note in second["notes"] if note.startswith("not ")]
    job.in_order()
