"""Stopped, killed, started again: the same numbers come out, to the bit."""

import json
import os
import re
import signal

import pytest
from job_process import Job
from run_material import long_recipe

from job.edge.host.crashing import disarm


def same_numbers(report, undisturbed):
    names = ("curve", "evaluations", "sweet_spot", "answers", "exact_match")
    assert {n: report[n] for n in names} == {n: undisturbed[n] for n in names}
    assert (
        report["adapter"]["files"]["adapter_model.safetensors"]
        == (undisturbed["adapter"]["files"]["adapter_model.safetensors"])
    )
    assert report["adapter"]["proven_loss"] == undisturbed["adapter"]["proven_loss"]
    assert report["resume_exact"] is True


def committed(run):
    return sorted(int(p.parent.name[5:11]) for p in run.glob("checkpoints/*/MANIFEST.json"))


def test_a_stop_in_training_ends_75_and_the_next_start_ends_as_if_there_had_been_none(job, finished):
    long_recipe(job)
    with job.begun("run") as running:
        running.until(lambda e: e["event"] == "step" and e["step"] >= 5)
        running.child.send_signal(signal.SIGTERM)
        stop_again = [running.child.send_signal(signal.SIGTERM) for _ in range(3)]  # an impatient operator
        stopped = running.end()
    assert stop_again
    assert stopped.code == 75, stopped.stdout + stopped.stderr
    assert stopped.stderr == ""
    last, newest = stopped.events[-1], max(committed(job.only_run()))
    assert last["event"] == "ended"
    assert last["exit_code"] == 75
    assert last["last_committed_step"] == newest == stopped.outcome["last_committed_step"]
    assert 5 <= newest < 30
    assert f"step {newest} of 30 is committed" in last["reason"]
    assert stopped.outcome["code"] == 75
    assert not (job.only_run() / "report.json").exists()

    resumed = job.start("run")
    assert resumed.code == 0, resumed.stdout + resumed.stderr
    (event,) = resumed.named("resumed")
    assert event["step"] == newest
    assert resumed.named("step")[0]["step"] == newest + 1
    assert "download" not in resumed.phases()  # what was encoded is used again
    report = job.report()
    same_numbers(report, finished[0].report())
    first, second = report["attempts"]
    assert (first["exit_code"], first["from_step"], first["last_committed_step"]) == (75, 0, newest)
    assert "asked to stop" in first["reason"]
    assert (second["exit_code"], second["from_step"]) == (0, newest)


def test_a_killed_run_goes_on_from_the_newest_checkpoint_that_verifies(job, finished):
    long_recipe(job)
    with job.begun("run") as running:
        running.until(lambda e: e["event"] == "checkpoint" and e["step"] >= 16)
        running.child.kill()
        killed = running.end()
    assert killed.code == -signal.SIGKILL
    checkpoints = job.only_run() / "checkpoints"
    whole = sorted(p.parent.name for p in checkpoints.glob("*/MANIFEST.json"))
    assert len(whole) >= 3, whole
    # The newest loses its manifest, the one before has one bit turned over.
    (checkpoints / whole[-1] / "MANIFEST.json").unlink()
    file = checkpoints / whole[-2] / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    resumed = job.start("run")
    assert resumed.code == 0, resumed.stdout + resumed.stderr
    assert resumed.named("resumed")[0]["checkpoint"] == whole[-3]
    report = job.report()
    same_numbers(report, finished[0].report())
    first, second = report["attempts"]
    assert first["exit_code"] is None
    assert "ended without a word" in first["reason"]
    passed_over = {each["checkpoint"]: each["reason"] for each in second["passed_over"]}
    assert "MANIFEST.json" in passed_over[whole[-1]]
    assert "sha256" in passed_over[whole[-2]]
    left = {p.name for p in checkpoints.iterdir()}
    assert whole[-1] not in left  # what was never committed does not stay for ever
    assert [e["checkpoint"] for e in resumed.named("checkpoint_passed_over")][-2:] == [whole[-1], whole[-2]]


@pytest.mark.parametrize("phase", ["load_libraries", "download", "encode"])
def test_a_stop_before_the_first_step_leaves_only_word_of_itself_in_the_store(job, phase):
    ended = job.call("run", stop_in=phase)
    assert ended.code == 75
    assert ended.events[-1]["event"] == "ended"
    assert ended.outcome["code"] == 75
    assert "last_committed_step" not in ended.outcome
    left = [path.name for path in sorted(job.only_run().rglob("*.json"))]
    assert left == ["01-end.json", "01.json", "lock.json"]
    assert job.call("run", "--set", "train.steps=1").code == 0  # and nothing there that misleads the next


def encoded_folders(job):
    return [path.parent for path in sorted((job.workdir / "cache" / "encoded").glob("*/MANIFEST.json"))]


def test_another_run_over_the_same_data_encodes_nothing(job):
    first = job.call("run", stop_in="ask_base")
    assert {"download", "encode"} <= set(first.phases())
    job.recipe["train"]["seed"] = 7
    job.recipe["data"]["max_length"] = 32  # what is cut off later is in what is kept
    second = job.call("run", stop_in="ask_base")
    assert second.code == 75, second.stdout
    assert not {"download", "encode"} & set(second.phases())
    assert len(encoded_folders(job)) == 1
    (one,), (other,) = first.named("dataset"), second.named("dataset")
    assert (one["train"], one["validation"]) == (other["train"], other["validation"]) == (24, 6)


def test_the_same_content_at_another_place_is_fetched_and_not_encoded(job):
    assert job.call("run", stop_in="ask_base").code == 75
    (job.folder / "elsewhere").mkdir()
    (job.data / "train.jsonl").rename(job.folder / "elsewhere" / "train.jsonl")
    job.recipe["data"]["train"] = f"file://{job.folder}/elsewhere/train.jsonl"
    ended = job.call("run", stop_in="ask_base")
    assert "download" in ended.phases()
    assert "encode" not in ended.phases()


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "Q: {question}\n"},
        {"validation": {"fraction": 0.4}},
        {"loss_on": "all"},
        {"max_record": 999},
        {"strict_types": True},
    ],
)
def test_what_changes_the_token_ids_is_encoded_anew(job, change):
    assert job.call("run", stop_in="ask_base").code == 75
    job.recipe["data"].update(change)
    assert "encode" in job.call("run", stop_in="ask_base").phases()
    assert len(encoded_folders(job)) == 2


@pytest.mark.parametrize("damage", ["shorter", "one bit", "gone", "other format", "no manifest"])
def test_kept_data_that_is_damaged_is_encoded_anew(job, damage):
    assert job.call("run", stop_in="ask_base").code == 75
    (place,) = encoded_folders(job)
    file, manifest = place / "train.arrow", place / "MANIFEST.json"
    content, facts = file.read_bytes(), json.loads(manifest.read_text())
    match damage:
        case "shorter":
            file.write_bytes(content[:-1])
        case "one bit":
            file.write_bytes(content[:900] + bytes([content[900] ^ 1]) + content[901:])
        case "gone":
            file.unlink()
        case "other format":
            manifest.write_text(json.dumps(facts | {"format": facts["format"] - 1}))
        case _:
            manifest.unlink()
    again = job.call("run", stop_in="ask_base")
    assert again.code == 75, again.stdout
    assert {"download", "encode"} <= set(again.phases())
    assert file.read_bytes() == content
    assert json.loads(manifest.read_text()) == facts


def test_a_few_encoded_datasets_stay_those_used_last(job):
    for number in range(6):
        job.recipe["data"]["prompt"] = f"{number}: {{question}}\n"
        assert job.call("run", stop_in="ask_base").code == 75
    assert len(encoded_folders(job)) == 4
    assert "encode" not in job.call("run", stop_in="ask_base").phases()
    job.recipe["data"]["prompt"] = "0: {question}\n"
    assert "encode" in job.call("run", stop_in="ask_base").phases()


def test_what_stopped_starts_left_is_taken_away(job):
    """Their folders hold no dataset; a young one may be another start's that has just begun."""
    assert job.call("run", stop_in="encode").code == 75
    assert encoded_folders(job) == []
    (left,) = (job.workdir / "cache" / "encoded").iterdir()
    young = left.with_name("0" * 32)
    young.mkdir()
    os.utime(left, (0, 0))
    job.recipe["data"]["prompt"] = "another: {question}\n"
    assert job.call("run", stop_in="ask_base").code == 75
    assert not left.exists()
    assert young.exists()


@pytest.mark.parametrize("phase", ["ask_base", "train|evaluate", "prove", "ask_tuned"])
def test_a_stop_outside_of_training_is_resumed_too(job, phase):
    job.recipe["train"]["steps"] = 2
    ended = job.call("run", stop_in=phase)
    assert ended.code == 75
    assert not (job.only_run() / "report.json").exists()
    if phase in ("ask_base", "train|evaluate"):  # in its first evaluation
        assert "last_committed_step" not in ended.outcome
        assert "is committed" not in ended.outcome["reason"]
    else:
        assert ended.outcome["last_committed_step"] == 2
    assert job.call("run").code == 0
    assert [a["exit_code"] for a in job.report()["attempts"]] == [75, 0]


def test_a_damaged_checkpoint_is_not_chosen_and_the_report_says_so(job):
    """All but the newest are damaged once training is over; without that the first would have been chosen."""
    job.recipe["train"]["learning_rate"] = 1e-12  # so all evaluations are equal, and the first one counts
    try:
        assert job.call("run", "--crash-at", "adapter.before_file=error").code == 70
    finally:
        disarm()
    *older, newest = sorted(job.only_run().glob("checkpoints/*"))
    for place in older:
        file = place / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"!")

    ended = job.call("run")

    assert ended.code == 0, ended.stdout
    passed_over = [event["checkpoint"] for event in ended.named("checkpoint_passed_over")]
    assert passed_over
    assert newest.name not in passed_over
    report = job.report()
    assert report["sweet_spot"]["step"] == 6
    assert [note for note in report["notes"] if note.startswith(f"{passed_over[0]} would have been chosen")]


def test_a_resume_on_another_device_goes_on_within_rounding_and_every_later_report_says_so(job, tmp_path, base, warm):
    """Another number of threads is another device. The third attempt changes nothing, and knows what the second did."""
    undisturbed = Job(tmp_path / "undisturbed", base, warm)
    for each in (job, undisturbed):
        each.recipe["lora"]["dropout"], each.recipe["train"]["steps"] = 0.0, 12
    assert undisturbed.start("run").code == 0
    for threads, step in (("1", 2), ("2", 4)):
        with job.begun("run", OMP_NUM_THREADS=threads) as running:
            running.until(lambda e, step=step: e["event"] == "checkpoint" and e["step"] >= step)
            running.child.kill()
    ended = job.start("run", OMP_NUM_THREADS="2")

    assert ended.code == 0, ended.stdout
    report, expected = job.report(), undisturbed.report()
    assert report["resume_exact"] is False
    (note,) = [note for note in report["notes"] if "resumed at step" in note]
    assert re.search(r"on CPU, 2 threads in (bf16|fp32) after CPU, 1 threads in \1: equal within rounding", note)
    assert report["curve"]["loss"] == pytest.approx(expected["curve"]["loss"], rel=1e-3)
    assert report["curve"]["learning_rate"] == expected["curve"]["learning_rate"]
    assert expected["resume_exact"] is True
