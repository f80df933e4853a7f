"""Nights on a channel: what is promoted, what is refused and why, what is new, and a night without anything to do."""

import gzip
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from job_process import call, objects, records, write_lines
from nightly_job import CHANNEL, NightlyJob, with_customers
from run_material import make_base
from warm_image import PATIENCE_SECONDS

from job.commands import channel as channel_command
from job.core.crash_points import POINTS
from job.core.nightly.channel import Judged, promotion_of, read_as, rollback_to
from job.edge.host.interrupt import Interrupt
from job.edge.store.json_objects import json_bytes
from job.edge.store.probing import Probe
from job.stages.attempts import identity
from job.stages.nightly import fresh_records

WEIGHTS = "adapter_model.safetensors"
EARLIER = {json.dumps(row) for row in records(24)}


@pytest.fixture
def job(tmp_path, base, warm):
    return NightlyJob(tmp_path, base, warm)


def poisoned(count, *, seed):
    """The right questions with answers that lead away from what the held-out ones ask."""
    return [row | {"answer": "hats hats"} for row in records(count, seed=seed)]


def test_three_nights_the_first_without_a_champion_one_without_new_data_one_with(job):
    job.recipe["promote"] |= {"cluster": "customer", "slices": ["lang"]}
    job.recipe["evaluate"] |= {"answers": 50, "metric": "rouge_l"}
    ended, report = job.night()
    assert [(e["model"], e["questions"]) for e in ended.named("asked_anew")] == [("the base", 50)]
    first = report["promotion"]["judged"]["answers"]
    assert (first["examples"], first["clusters"]) == (50, 25)
    assert first["mean"] == pytest.approx(-report["metric"]["scores"]["gain"], abs=1e-5), (
        "as the run itself judged them"
    )
    assert {each["champion"] for each in report["answers"]} == {None}, "the base stands beside it anyway"
    found = report["promotion"]
    assert found["outcome"] == "promoted", found
    assert found["said"].startswith("Promoted: ")
    assert found["judged"]["decision"]["champion"] == "the base"
    assert found["judged"]["gap"]["clusters"] == 30
    assert {*found["judged"]["slices"]} == {"lang=de", "lang=en"}
    assert found["judged"]["checkpoints"] == len(report["evaluations"]) > 1
    assert found["new"]["records"] == 24
    assert job.promoted()["run_id"] == report["run_id"]
    job.in_order()
    (night,) = job.state()["nights"]
    assert (night["work"]["attempts"], night["work"]["tokens"]) == (1, report["throughput"]["tokens"])
    assert night["work"]["held_seconds"] >= night["work"]["train_seconds"] - 1
    (asked,) = [json.loads(path.read_text()) for path in (job.channel / "exams").iterdir()]
    assert {*asked["where"]} == {f"validation.jsonl:{line}" for line in range(1, 61)}

    stood = objects(job.store)
    ended, nothing = job.night()
    assert nothing is None
    assert ended.named("already_done")
    assert ended.phases() == ["identify"]
    assert objects(job.store) == stood

    job.more("2", 12, seed=5)
    ended, second = job.night()
    new = second["promotion"]["new"]
    assert new["files"] == [f"file://{job.data}/train-2.jsonl"]
    assert (new["file_count"], new["records"], new["unseen"]) == (1, 12, 12)
    assert ended.named("new_data")[0]["since"] == report["run_id"]
    assert [e["model"] for e in ended.named("judged_anew")] == []
    assert ended.named("asked_anew") == [], "the champion's answers are kept"
    assert [each["champion"] for each in second["answers"]] == [each["tuned"] for each in report["answers"]]
    assert [each["champion_score"] for each in second["answers"]] == pytest.approx(
        [each["tuned_score"] for each in report["answers"]]
    )
    scores = [np.mean([each[name] for each in second["answers"]]) for name in ("champion_score", "tuned_score")]
    assert second["promotion"]["judged"]["answers"]["mean"] == pytest.approx(scores[0] - scores[1], abs=1e-9)
    assert second["promotion"]["judged"]["decision"]["champion"] == report["run_id"]
    (fresh,) = ended.named("fresh_records")
    asked = {row["question"] for row in records(60, seed=1)}
    assert fresh["records"] == len([row for row in records(12, seed=5) if row["question"] not in asked])
    assert {*fresh["losses"]} == {report["run_id"]}
    nights = job.state()["nights"]
    assert [night["run_id"] for night in nights] == [report["run_id"], second["run_id"]]
    assert job.state()["budget"]["tests"] == 2
    job.in_order()


def test_a_file_that_is_not_whole_is_left_out_by_name_and_learned_once_it_is(job, received):
    url, got = received
    job.night()
    late = job.data / "train-late.jsonl"
    whole = "".join(json.dumps(row) + "\n" for row in records(8, seed=4))
    late.write_text(whole[: len(whole) - 20])
    ended, nothing = job.night(JOB_NOTIFY_URL=url)
    assert nothing is None, "without the late file nothing has changed"
    assert [e["file"] for e in ended.named("late_file")] == [f"file://{late}"]
    said = f"left out, not whole yet: file://{late}: it does not end with a line end"
    assert ended.outcome["reason"] == f"done; {said}"
    ((_, notice),) = got
    assert notice["late"] == [said.removeprefix("left out, not whole yet: ")]
    assert said in notice["text"], "nobody reads the log of a night that had nothing to do"

    job.more("3", 6, seed=6)
    late.write_text(whole.rstrip("\n"))
    _, report = job.night()
    assert report["promotion"]["late"] == [f"file://{late}: it does not end with a line end"]
    assert any(note.startswith("left out, not whole yet: ") for note in report["notes"])
    assert not any("late" in o["uri"] for o in report["data"]["train"]["objects"])

    learned = report["promotion"]["outcome"] == "promoted"
    late.write_text(whole)
    _, report = job.night()
    assert report["promotion"]["late"] == []
    assert report["promotion"]["new"]["unseen"] == 8
    assert report["promotion"]["new"]["records"] == (8 if learned else 8 + 6)


@pytest.mark.nightly
def test_a_compressed_file_is_left_out_while_it_breaks_off_and_refused_by_its_line_where_it_is_damaged(job):
    job.night()
    packed = job.data / "train-late.jsonl"  # as its first bytes say, whatever its name
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in records(200, seed=4))
    whole = gzip.compress(lines)
    packed.write_bytes(whole[:-100])
    ended, nothing = job.night()
    assert nothing is None
    assert [e["reason"] for e in ended.named("late_file")] == ["the compressed file breaks off"]

    packed.write_bytes(gzip.compress(lines[:3000]) + b"\x1f\x8b" + b"?" * 100)
    stood = job.runs()
    ended, _ = job.night(code=65)
    assert "train-late.jsonl:" in ended.outcome["reason"]
    assert "the compressed file is damaged from here on" in ended.outcome["reason"]
    assert job.runs() == stood, "bad input leaves no run"

    packed.write_bytes(whole)
    _, report = job.night()
    assert report["promotion"]["new"]["file_count"] == 1


@pytest.mark.nightly
@pytest.mark.parametrize("key", ["data.validation", "promote.regression"])
def test_what_models_are_judged_on_is_waited_for_by_name_before_anything_is_trained(job, key):
    path = job.data / ("validation.jsonl" if key == "data.validation" else "keep.jsonl")
    whole = "".join(json.dumps(row) + "\n" for row in with_customers(records(40, seed=3)))
    path.write_text(whole[:-20])
    if key == "promote.regression":
        job.recipe["promote"]["regression"] = f"file://{path}"
    ended, _ = job.night(code=65)
    assert f"{key}: not whole yet" in ended.outcome["reason"]
    assert f"{path.name}: it does not end with a line end" in ended.outcome["reason"]
    assert "train" not in ended.phases()

    path.write_text(whole)
    _, report = job.night()
    assert report["promotion"]["outcome"] == "promoted"


def until_frozen(running):
    """Wait until a crash point has stopped the process; read its output up to near there, for the pipe holds a page."""
    until = time.monotonic() + PATIENCE_SECONDS
    while Path(f"/proc/{running.child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.nightly
def test_a_file_that_changes_while_it_is_read_ends_the_night_with_65_by_name_and_the_next_reads_it_anew(job):
    job.night()
    path = job.more("2", 12, seed=5)
    with job.begun("run", "--crash-at", "download.before=freeze") as frozen:
        frozen.until(lambda event: event["event"] == "phase" and event["name"] == "fetch_base")
        until_frozen(frozen)
        write_lines(path, records(20, seed=6))
        frozen.child.send_signal(signal.SIGCONT)
        ended = frozen.end()
    assert ended.code == 65, ended.stdout
    assert "train-2.jsonl" in ended.outcome["reason"]
    assert len(job.runs()) == 1, "bad input leaves no run"

    _, report = job.night()
    assert report["promotion"]["new"]["files"] == [f"file://{path}"]
    assert report["promotion"]["new"]["records"] == len({json.dumps(row) for row in records(20, seed=6)} - EARLIER)


@pytest.mark.nightly
def test_a_source_without_any_whole_file_ends_with_65_and_says_which(job):
    path = job.data / "train.jsonl"
    path.write_text(path.read_text() + '{"question": "12 red')
    ended, _ = job.night(code=65)
    assert "train.jsonl: it does not end with a line end" in ended.outcome["reason"]
    assert job.runs() == []


def test_a_poisoned_night_is_refused_with_exit_code_0_and_its_report_says_why(job):
    _, good = job.night()
    write_lines(job.data / "train-poison.jsonl", poisoned(200, seed=9))
    ended, bad = job.night()
    assert ended.code == 0
    judged = bad["promotion"]["judged"]
    assert judged["challenger_loss"] > judged["champion_loss"] + 0.1, "the damage is there"
    assert bad["promotion"]["outcome"] == "refused"
    assert judged["decision"]["verdict"] == "not better"
    assert bad["promotion"]["said"].startswith("Not promoted, not better: ")
    assert job.promoted()["run_id"] == good["run_id"]
    shown = call("report", f"file://{job.store}/runs/{bad['run_id']}").stdout
    assert "channel            notes: Not promoted, not better" in shown
    job.in_order()

    write_lines(job.data / "train-poison.jsonl", records(8, seed=4))
    _, third = job.night()
    new = third["promotion"]["new"]
    assert (new["records"], new["unseen"]) == (8, 8)
    write_lines(job.data / "train-poison.jsonl", poisoned(200, seed=9) + records(8, seed=6))
    _, fourth = job.night()
    again = fourth["promotion"]["new"]
    poison = {json.dumps(row) for row in poisoned(200, seed=9)}
    assert again["unseen"] == 8, "the poison was seen by the night that was refused"
    assert again["records"] == len(poison) + 8, "and not by the model in use"


@pytest.mark.nightly
def test_a_run_that_starts_from_the_model_in_use_says_so_and_begins_where_that_ended(job):
    job.recipe["promote"]["start_from"] = "promoted"
    _, first = job.night()
    assert first["promotion"]["parent"] is None
    ended, nothing = job.night()
    assert nothing is None, "what is in use has changed, and the data has not"
    assert ended.named("already_done")

    job.more("2", 12, seed=5)
    _, second = job.night()
    parent = second["promotion"]["parent"]
    assert (parent["run_id"], parent["sequence"]) == (first["run_id"], 1)
    weights = first["adapter"]["files"]["adapter_model.safetensors"]["sha256"]
    assert parent["weights"] == weights
    record = json.loads((job.store / "runs" / second["run_id"] / "run.json").read_text())
    assert record["parent"] == parent
    assert second["evaluations"][0]["loss"] == pytest.approx(first["sweet_spot"]["loss"], abs=1e-3)
    assert any("step 0 is that model" in note for note in second["notes"])
    job.in_order()


@pytest.mark.nightly
def test_older_data_is_replayed_by_a_source_with_a_weight_and_only_what_is_new_counts_as_new(job):
    write_lines(job.data / "older.jsonl", records(40, seed=20))
    job.recipe["data"]["train"] = [
        {"uri": f"file://{job.data}/train*.jsonl", "weight": 3},
        {"uri": f"file://{job.data}/older*.jsonl", "weight": 1},
    ]
    job.recipe["promote"]["start_from"] = "promoted"
    _, first = job.night()
    assert first["promotion"]["outcome"] == "promoted"

    job.more("2", 12, seed=5)
    late = write_lines(job.data / "older-2.jsonl", records(8, seed=21))
    late.write_bytes(late.read_bytes()[:-1])
    _, second = job.night()
    found = second["promotion"]
    assert found["parent"]["run_id"] == first["run_id"]
    assert found["new"]["files"] == [f"file://{job.data}/train-2.jsonl"], "what is replayed is not new"
    assert found["late"] == [f"file://{late}: it does not end with a line end"], "of every source"
    assert [source["share"] for source in second["plan"]["sources"]] == pytest.approx([0.75, 0.25])
    job.in_order()


@pytest.mark.nightly
def test_an_adapter_of_another_form_cannot_be_started_from(job):
    job.night()
    job.recipe["promote"]["start_from"] = "promoted"
    job.recipe["lora"]["alpha"] = 16
    ended, _ = job.night(code=64)
    assert "lora_alpha 8 there and 16 here" in ended.outcome["reason"]


@pytest.mark.nightly
def test_a_channel_has_models_of_one_base(job, tmp_path):
    _, first = job.night()
    job.recipe["model"]["base"] = str(make_base(tmp_path / "another", positions=128))
    ended, _ = job.night(code=64)
    assert "give this one a channel of its own" in ended.outcome["reason"]
    assert job.promoted()["run_id"] == first["run_id"]


@pytest.mark.nightly
def test_a_field_that_the_held_out_records_lack_is_missed_before_anything_is_trained(job):
    job.recipe["promote"]["cluster"] = "client"
    ended, _ = job.night(code=65)
    assert 'validation.jsonl:1: "client" is missing' in ended.outcome["reason"]
    assert "train" not in ended.phases()


@pytest.mark.nightly
def test_the_regression_set_holds_a_better_model_up(job):
    """Better on what is asked, worse on what must not be lost."""
    write_lines(job.data / "keep.jsonl", [row | {"answer": "hats hats"} for row in records(40, seed=3)])
    job.recipe["promote"]["regression"] = f"file://{job.data}/keep.jsonl"
    write_lines(job.data / "train.jsonl", records(24) + poisoned(60, seed=9))
    job.recipe["train"]["steps"] = 12
    _, both = job.night()
    assert both["promotion"]["outcome"] == "promoted", both["promotion"]["said"]
    (job.data / "train.jsonl").unlink()
    write_lines(job.data / "train-2.jsonl", records(120, seed=8))
    _, narrow = job.night()
    judged = narrow["promotion"]["judged"]
    assert judged["challenger_loss"] < judged["champion_loss"] - 0.1
    assert judged["regression"]["mean"] > 0.1, "the damage is there"
    assert judged["decision"]["verdict"] == "better"
    assert narrow["promotion"]["outcome"] == "refused"
    assert "regression set" in judged["decision"]["held_up_by"]


@pytest.mark.nightly
def test_new_records_promote_a_run_that_could_not_be_told_from_the_model_in_use(job):
    """On a dozen held-out examples nothing can be told; once enough nights' new records have spoken for it, it can."""
    write_lines(job.data / "validation.jsonl", records(12, seed=1))
    _, first = job.night()
    assert first["promotion"]["judged"]["decision"]["verdict"] == "cannot tell"
    (waits,) = job.state()["waiting"]
    assert (waits["challenger"], waits["champion"], waits["records"]) == (first["run_id"], "the base", 0)

    job.all_but_enough()
    job.more("2", 200, seed=7)
    ended, second = job.night()
    phases = ended.phases()
    assert phases.index("test_before_training") < phases.index("train")
    assert second["promotion"]["fresh_promotion"] == first["run_id"]
    (other,) = second["promotion"]["also"]
    assert other.startswith(f"Promoted: {first['run_id']} is better than the base on ")
    assert second["promotion"]["judged"]["decision"]["champion"] == first["run_id"]
    entry = job.history()[0]
    assert entry["run_id"] == first["run_id"]
    assert "records of 10 nights that neither had seen" in entry["why"]
    job.in_order()


@pytest.mark.nightly
def test_two_seeds_are_both_trained_and_the_worse_one_decides(job):
    job.recipe["promote"]["seeds"] = 2
    ended, _ = job.night()
    assert [name for name in ended.phases() if name in {"channel", "test_before_training", "train", "judge"}] == [
        "channel",
        "test_before_training",
        "train",
        "train",
        "judge",
        "judge",
    ], "all that is looked at before a training is looked at once, and before both"
    main, other = of_two_seeds(job)
    assert other["recipe"]["train"]["seed"] == main["recipe"]["train"]["seed"] + 1
    judged = main["promotion"]["judged"]
    assert len(judged["seeds"]) == 2
    assert judged["gap"]["mean"] == max(gap["mean"] for gap in judged["seeds"])
    assert job.promoted()["run_id"] == main["run_id"]
    assert any(note.startswith("Two seeds were trained") for note in judged["decision"]["notes"])
    ended, nothing = job.night()
    assert nothing is None
    assert ended.phases() == ["identify"]


def of_two_seeds(job):
    """The reports of the run itself and of the other training."""
    reports = job.reports()
    assert len(reports) == 2
    return sorted(reports.values(), key=lambda report: report["promotion"] is None)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        ({"cluster": "client"}, 65, '"client" is missing'),
        ({"slices": ["town"]}, 64, "no held-out record has the field town"),
        ({"regression": "nowhere.jsonl"}, 66, "nowhere.jsonl"),
    ],
)
def test_what_is_wrong_with_a_night_of_two_seeds_is_found_before_either_is_trained(job, wrong, code, said):
    if "regression" in wrong:
        wrong = {"regression": f"file://{job.data}/{wrong['regression']}"}
    job.recipe["promote"] |= {"seeds": 2} | wrong
    ended, _ = job.night(code=code)
    assert said in ended.outcome["reason"]
    assert "train" not in ended.phases()
    (begun,) = job.runs()
    assert begun.name == ended.outcome["run_uri"].rpartition("/")[2], "the run itself, which stands for both"


@pytest.mark.nightly
def test_another_base_than_the_one_in_use_is_found_before_either_of_two_seeds_is_trained(job, tmp_path):
    job.night()
    job.recipe["promote"]["seeds"] = 2
    job.recipe["model"]["base"] = str(make_base(tmp_path / "another", positions=128))
    ended, _ = job.night(code=64)
    assert "give this one a channel of its own" in ended.outcome["reason"]
    assert "train" not in ended.phases()
    assert len(job.runs()) == 2


@pytest.mark.nightly
@pytest.mark.parametrize("point", ["step.after_update:2", "report.after"])
def test_killed_in_the_other_of_two_trainings_the_run_is_resumed_before_new_data_is_looked_at(job, point):
    job.recipe["promote"]["seeds"] = 2
    killed = job.start("run", "--crash-at", point)
    assert killed.code == -signal.SIGKILL, killed.stdout
    begun = {run.name for run in job.runs()}
    assert len(begun) == 2
    job.more("2", 12, seed=5)

    job.night()
    assert {run.name for run in job.runs()} == begun, "no other run than the two that were begun"
    main, other = of_two_seeds(job)
    for report in (main, other):
        assert not any("train-2" in each["uri"] for each in report["data"]["train"]["objects"])
    assert [each["run_id"] for each in main["promotion"]["judged"]["others"]] == [other["run_id"]]
    assert main["promotion"]["outcome"] == "promoted", main["promotion"]["said"]
    assert job.state()["budget"]["tests"] == 1
    job.in_order()

    _, third = job.night()
    assert third["promotion"] is None or third["promotion"]["new"]["file_count"] == 1
    assert len(job.runs()) == 4, "the new data is a run of its own"
    job.in_order()


class OnceCommitted(Interrupt):
    """Asks to stop as soon as there is a checkpoint more."""

    def __init__(self, store):
        super().__init__()
        self._store, self._before = store, self._committed(store)

    def __call__(self):
        return self._committed(self._store) > self._before

    @staticmethod
    def _committed(store):
        names = (path.parent.name for path in store.glob("runs/*/checkpoints/*/MANIFEST.json"))
        return max(names, default="")


@pytest.mark.nightly
def test_stops_in_the_other_training_are_not_in_vain_for_the_run_while_that_goes_on(job):
    job.recipe["promote"]["seeds"] = 2
    job.recipe["train"]["steps"] = 20
    stops = [call(*job.command("run")[2:], interrupt=OnceCommitted(job.store)) for _ in range(3)]
    assert [ended.code for ended in stops] == [75, 75, 75], stops[-1].stdout
    assert [*job.store.glob("runs/*/report.json")] == []
    assert job.start("run").code == 0
    of_two_seeds(job)


@pytest.mark.nightly
def test_a_night_that_failed_for_good_does_not_stand_in_the_way_of_new_data(job):
    """The same data ends in the same way; with more of it the next night begins a run of its own."""
    job.recipe["train"]["learning_rate"] = 1e38
    job.night(code=80)
    (failed,) = job.runs()
    job.night(code=80)
    assert job.runs() == [failed], "nothing has changed: it is the same run"

    job.more("2", 12, seed=5)
    ended, _ = job.night(code=80)
    (left,) = ended.named("unfinished_run_left")
    assert left["run_id"] == failed.name
    assert "there is other data by now" in left["reason"]
    assert len(job.runs()) == 2


# --- several at once -------------------------------------------------------------------------------------------------


def test_of_two_runs_at_the_same_moment_one_wins_and_the_other_is_judged_again_next_night(job, received):
    url, got = received
    with job.begun("run", "--crash-at", "verdict.after=freeze", "--set", "train.seed=1") as frozen:
        frozen.until(lambda event: event["event"] == "phase" and event["name"] == "judge")
        until_frozen(frozen)
        _, winner = job.night("--set", "train.seed=2")
        assert winner["promotion"]["outcome"] == "promoted"
        frozen.child.send_signal(signal.SIGCONT)
        ended = frozen.end()
    assert ended.code == 0, ended.stdout
    (loser,) = [report for report in job.reports().values() if report["run_id"] != winner["run_id"]]
    assert loser["promotion"]["outcome"] == "lost"
    assert "no longer in use" in loser["promotion"]["said"]
    assert job.promoted()["run_id"] == winner["run_id"]
    assert job.state()["again"] == [loser["run_id"]]
    looked = call("report", str(job.write()), "--set", "train.seed=1")
    assert looked.code == 66, "who submits a night only where there is something to do finds it here"
    assert f"to do: {loser['run_id']} lost the swap" in looked.stdout
    assert "Not promoted" in looked.stdout, "the report is shown all the same"

    ended, nothing = job.night("--set", "train.seed=1", JOB_NOTIFY_URL=url)
    assert nothing is None
    assert "train" not in ended.phases()
    ((_, notice),) = got
    told = notice["promotion"]
    assert (told["challenger"], told["champion"]) == (loser["run_id"], winner["run_id"])
    assert told["why"] in notice["text"], "what is in use may have changed, and nothing was trained"
    (judged,) = ended.named("judged")
    assert judged["champion"] == winner["run_id"]
    assert job.state()["again"] == []
    assert [night["round"] for night in job.state()["nights"]] == [1, 1, 2]
    assert job.state()["budget"]["tests"] == 3
    job.in_order()


@pytest.mark.nightly
def test_a_copy_that_a_kill_left_unfinished_is_something_to_do(job):
    job.night()
    assert call("report", str(job.write())).code == 0
    (job.channel / "adapter" / "MANIFEST.json").unlink()
    looked = call("report", str(job.write()))
    assert looked.code == 66
    assert f"to do: file://{job.channel}/adapter is not the adapter in use" in looked.stdout

    _, nothing = job.night()
    assert nothing is None
    job.in_order()
    assert call("report", str(job.write())).code == 0


@pytest.mark.nightly
def test_a_run_that_lost_its_swap_and_was_deleted_is_judged_no_more(job):
    with job.begun("run", "--crash-at", "verdict.after=freeze", "--set", "train.seed=1") as frozen:
        frozen.until(lambda event: event["event"] == "phase" and event["name"] == "judge")
        until_frozen(frozen)
        _, winner = job.night("--set", "train.seed=2")
        frozen.child.send_signal(signal.SIGCONT)
        assert frozen.end().code == 0
    (loser,) = job.state()["again"]
    shutil.rmtree(job.store / "runs" / loser / "adapter")

    ended, _ = job.night("--set", "train.seed=2")
    assert [e["run_id"] for e in ended.named("not_judged_again")] == [loser]
    assert job.state()["again"] == []
    assert job.state()["budget"]["tests"] == 2, "nothing is paid for it"
    assert job.promoted()["run_id"] == winner["run_id"]
    job.in_order()


@pytest.mark.nightly
def test_a_rollback_while_a_night_runs_holds_and_the_night_says_so(job):
    _, first = job.night()
    uri = f"file://{job.channel}"
    job.more("2", 60, seed=5)
    job.recipe["train"]["steps"] = 20
    with job.begun("run", "--crash-at", "verdict.after=freeze") as frozen:
        frozen.until(lambda event: event["event"] == "phase" and event["name"] == "judge")
        until_frozen(frozen)
        shown = call("channel", uri, "--rollback", "base")
        assert shown.code == 0, shown.stdout
        assert f"Rolled back by hand from {first['run_id']} to the base." in shown.stdout
        frozen.child.send_signal(signal.SIGCONT)
        ended = frozen.end()
    assert ended.code == 0, ended.stdout
    (night,) = [report for report in job.reports().values() if report["run_id"] != first["run_id"]]
    assert night["promotion"]["outcome"] == "lost", night["promotion"]["said"]
    now = job.promoted()
    assert (now["kind"], now["run_id"], now["sequence"], now["replaced"]) == ("rollback", None, 2, first["run_id"])
    assert job.state()["again"] == [night["run_id"]]
    job.in_order()
    ended, nothing = job.night()
    assert nothing is None
    assert "train" not in ended.phases()
    (again,) = ended.named("judged")
    assert (again["run_id"], again["champion"], again["outcome"]) == (night["run_id"], "the base", "promoted")
    assert (job.state()["again"], job.promoted()["run_id"], job.promoted()["sequence"]) == ([], night["run_id"], 3)
    job.in_order()

    back = call("channel", uri, "--rollback", first["run_id"])
    assert back.code == 0, back.stdout
    assert job.promoted()["run_id"] == first["run_id"]
    assert f"in use    {first['run_id']}" in back.stdout
    assert [each["kind"] for each in job.history()] == ["promotion", "rollback", "promotion", "rollback"]
    job.in_order()
    again = call("channel", uri, "--rollback")
    assert job.promoted()["run_id"] == night["run_id"], again.stdout
    again = call("channel", uri, "--rollback", "base")
    assert job.promoted()["run_id"] is None, again.stdout


@pytest.mark.nightly
def test_what_changes_while_new_records_are_scored_costs_the_night_nothing_but_the_swap(job, monkeypatch):
    """A rival puts a model in use after tonight has read what is: who waited is judged again, and the night trains."""
    write_lines(job.data / "validation.jsonl", records(12, seed=1))
    _, first = job.night()
    (waits,) = job.state()["waiting"]
    assert waits["challenger"] == first["run_id"]

    job.all_but_enough()
    job.more("2", 200, seed=7)
    score = fresh_records.FreshRecords._score

    def score_meanwhile(*asked):
        found = score(*asked)
        content = json.loads((job.channel / "verdicts" / f"{first['run_id']}-1.json").read_text())
        mine = promotion_of(read_as(Judged, content), channel=CHANNEL, time="2026-11-29T02:17:00+00:00", by="rival")
        back = rollback_to(None, mine, time="2026-11-29T02:18:00+00:00", by="rival")
        (job.channel / "promoted.json").write_bytes(json_bytes(back.model_dump(mode="json")))
        return found

    monkeypatch.setattr(fresh_records.FreshRecords, "_score", score_meanwhile)
    ended = job.call("run")
    assert ended.code == 0, ended.stdout
    (second,) = [report for report in job.reports().values() if report["run_id"] != first["run_id"]]
    (other,) = second["promotion"]["also"]
    assert "no longer in use" in other
    assert second["promotion"]["fresh_promotion"] is None
    assert job.promoted()["run_id"] != first["run_id"]
    assert job.state()["again"] == [first["run_id"]]
    monkeypatch.undo()
    ended, nothing = job.night()
    assert nothing is None
    assert [each["run_id"] for each in ended.named("judged")] == [first["run_id"]]
    assert job.state()["again"] == []


@pytest.mark.nightly
@pytest.mark.parametrize("is_another", [False, True])
def test_a_run_that_was_deleted_is_done_anew_and_judged_anew_if_it_is_another_model(job, is_another):
    _, first = job.night()
    write_lines(job.data / "train-poison.jsonl", poisoned(60, seed=9))
    _, bad = job.night()
    assert bad["promotion"]["outcome"] == "refused"
    shutil.rmtree(job.store / "runs" / bad["run_id"])
    if is_another:
        verdict = job.channel / "verdicts" / f"{bad['run_id']}-1.json"
        verdict.write_text(
            verdict.read_text().replace(bad["promotion"]["judged"]["adapter"]["files"][WEIGHTS]["sha256"], "0" * 64)
        )

    _, again = job.night()
    assert again["run_id"] == bad["run_id"]
    assert again["promotion"]["outcome"] == "refused"
    assert again["promotion"]["judged"]["round"] == 1 + is_another
    assert job.state()["budget"]["tests"] == 2 + is_another
    assert job.promoted()["run_id"] == first["run_id"]
    job.in_order()


def test_going_back_to_a_run_that_was_deleted_changes_nothing(job):
    _, first = job.night()
    uri = f"file://{job.channel}"
    assert call("channel", uri, "--rollback", "base").code == 0
    (job.store / "runs" / first["run_id"] / "adapter" / WEIGHTS).unlink()
    stood = objects(job.store)

    refused = call("channel", uri, "--rollback", first["run_id"])
    assert refused.code == 66
    assert "nothing was changed" in refused.stdout + refused.stderr
    assert objects(job.store) == stood
    job.in_order()


CHANNEL_POINTS = [
    name
    for name in POINTS
    if name.split(".")[0] in {"fresh_records", "verdict", "promoted", "channel_adapter", "channel_state"}
]
BEFORE_THE_SWAP = {"fresh_records.before", "fresh_records.after", "verdict.before", "verdict.after"}


@pytest.fixture(scope="session")
def second_night(tmp_path_factory, base, warm):
    """After a first night, with new data that make the second one's model better."""
    job = NightlyJob(tmp_path_factory.mktemp("nights") / "job", base, warm)
    job.night()
    job.more("2", 60, seed=5)
    job.recipe["train"]["steps"] = 20
    return job


@pytest.mark.nightly
@pytest.mark.parametrize("point", [*CHANNEL_POINTS, "report.before", "report.after"])
def test_killed_between_verdict_and_report_the_channel_is_the_old_or_the_new_one(second_night, point):
    job = as_it_was(second_night)
    old = job.promoted()
    killed = job.start("run", "--crash-at", point)
    assert killed.code == -signal.SIGKILL, killed.stdout
    now = job.promoted()
    is_new = now["sequence"] == old["sequence"] + 1
    assert is_new or now == old
    assert is_new is (point not in BEFORE_THE_SWAP)

    adapters = [path for path in job.store.glob("runs/*/adapter/*") if path.name != "README.md"]  # is for people alone
    published = {path: path.stat().st_mtime_ns for path in adapters}
    ended, report = job.night()
    if point not in BEFORE_THE_SWAP - {"verdict.after"}:
        assert {path: path.stat().st_mtime_ns for path in published} == published, "it may be in use"
    if point == "report.after":
        assert ended.named("already_done")
        report = next(each for each in job.reports().values() if each["run_id"] != old["run_id"])
    assert report["promotion"]["outcome"] == "promoted"
    assert report["promotion"]["new"]["records"] == len({json.dumps(row) for row in records(60, seed=5)} - EARLIER)
    assert report["promotion"]["new"]["files"] == [f"file://{job.data}/train-2.jsonl"]
    assert job.promoted()["run_id"] == report["run_id"]
    assert job.promoted()["sequence"] == old["sequence"] + 1
    assert job.state()["budget"]["tests"] == 2
    assert [night["run_id"] for night in job.state()["nights"]] == [old["run_id"], report["run_id"]]
    assert job.state()["nights"][-1]["work"]["tokens"] == report["throughput"]["tokens"]
    job.in_order()


@pytest.mark.nightly
def test_a_run_that_was_rolled_back_before_its_report_says_that_it_is_no_longer_in_use(second_night, received):
    job = as_it_was(second_night)
    old = job.promoted()
    assert job.start("run", "--crash-at", "promoted.after_swap").code == -signal.SIGKILL
    assert call("channel", f"file://{job.channel}", "--rollback").code == 0
    assert job.promoted()["run_id"] == old["run_id"]

    url, got = received
    _, report = job.night(JOB_NOTIFY_URL=url)
    found = report["promotion"]
    assert (found["outcome"], found["replaced_by"]) == ("promoted", old["run_id"])
    assert found["said"].startswith(f"Promoted, and no longer in use, since {old['run_id']} was put in its place: ")
    assert job.promoted()["run_id"] == old["run_id"]
    ((_, notice),) = got
    assert (notice["promotion"]["replaced_by"], notice["promotion"]["why"]) == (old["run_id"], found["said"])
    assert found["said"] in notice["text"]
    page = (job.store / "runs" / report["run_id"] / "report.html").read_text(encoding="utf-8")
    assert "Promoted, and no longer in use" in page
    assert f"it was put in use, and is no longer: {old['run_id']} is" in page
    job.in_order()


@pytest.fixture(scope="session")
def poisoned_night(tmp_path_factory, base, warm):
    """After a first night, with new data that make the second one's model worse."""
    job = NightlyJob(tmp_path_factory.mktemp("nights") / "job", base, warm)
    job.night()
    write_lines(job.data / "train-poison.jsonl", poisoned(200, seed=9))
    return job


@pytest.mark.nightly
@pytest.mark.parametrize(
    "point",
    ["fresh_records.after", "verdict.before", "verdict.after", "channel_state.before", "channel_state.after"],
)
def test_killed_on_the_way_to_a_refusal_the_model_in_use_stays_and_the_test_is_paid_once(poisoned_night, point):
    job = as_it_was(poisoned_night)
    old, adapter = job.promoted(), objects(job.channel / "adapter")
    killed = job.start("run", "--crash-at", point)
    assert killed.code == -signal.SIGKILL, killed.stdout
    assert (job.promoted(), objects(job.channel / "adapter")) == (old, adapter)

    _, report = job.night()
    assert report["promotion"]["outcome"] == "refused", report["promotion"]["said"]
    assert report["promotion"]["judged"]["round"] == 1
    assert job.promoted() == old
    assert job.state()["budget"]["tests"] == 2
    assert [night["run_id"] for night in job.state()["nights"]] == [old["run_id"], report["run_id"]]
    assert len(job.state()["fresh"]) == 1, "its new records count once"
    job.in_order()


@pytest.fixture(scope="session")
def undecided_night(tmp_path_factory, base, warm):
    """After nights on which nothing could be told, with new records on which it can."""
    job = NightlyJob(tmp_path_factory.mktemp("nights") / "job", base, warm)
    write_lines(job.data / "validation.jsonl", records(12, seed=1))
    job.night()
    job.all_but_enough()
    job.more("2", 200, seed=7)
    return job


@pytest.mark.nightly
@pytest.mark.parametrize("point", [each for each in CHANNEL_POINTS if not each.endswith((".before_file", "_manifest"))])
def test_killed_while_new_records_promote_a_run_that_waited_it_is_promoted_once(undecided_night, point):
    job = as_it_was(undecided_night)
    assert job.promoted() is None
    (waits,) = job.state()["waiting"]
    killed = job.start("run", "--crash-at", point)
    assert killed.code == -signal.SIGKILL, killed.stdout
    assert "train" not in killed.phases()
    is_new = job.promoted() is not None
    assert is_new is (point not in BEFORE_THE_SWAP)
    if is_new:
        assert job.promoted()["run_id"] == waits["challenger"]

    _, report = job.night()
    first = job.history()[0]
    assert (first["run_id"], first["sequence"]) == (waits["challenger"], 1)
    assert "records of 10 nights that neither had seen" in first["why"], "counted once"
    assert report["promotion"]["judged"]["decision"]["champion"] == waits["challenger"]
    nights = [(night["run_id"], night["round"]) for night in job.state()["nights"]]
    assert nights == [(waits["challenger"], 1), (waits["challenger"], 2), (report["run_id"], 1)]
    job.in_order()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "point",
    ["fresh_records.after", "verdict.after", "promoted.after_swap", "channel_state.after", "report.before:2"],
)
def test_killed_between_verdict_and_report_of_two_seeds_the_channel_is_the_old_or_the_new_one(second_night, point):
    job = as_it_was(second_night)
    old = job.promoted()
    killed = job.start("run", "--set", "promote.seeds=2", "--crash-at", point)
    assert killed.code == -signal.SIGKILL, killed.stdout
    is_new = job.promoted()["sequence"] == old["sequence"] + 1
    assert is_new is (point not in BEFORE_THE_SWAP)

    job.night("--set", "promote.seeds=2")
    (report,) = [r for r in job.reports().values() if r["promotion"] and r["run_id"] != old["run_id"]]
    assert report["promotion"]["outcome"] == "promoted", report["promotion"]["said"]
    assert len(report["promotion"]["judged"]["seeds"]) == 2
    assert (job.promoted()["run_id"], job.promoted()["sequence"]) == (report["run_id"], old["sequence"] + 1)
    assert len(job.reports()) == 3, "the first night's, and both trainings of this one"
    assert job.state()["budget"]["tests"] == 2
    assert [night["run_id"] for night in job.state()["nights"]] == [old["run_id"], report["run_id"]]
    job.in_order()


def as_it_was(job):
    """Its store as it was at first: objects are known by their URIs, so that it stays in its place."""
    kept = job.folder / "kept"
    if not kept.exists():
        shutil.copytree(job.store, kept)
    shutil.rmtree(job.store)
    shutil.copytree(kept, job.store)
    return job


@pytest.mark.nightly
def test_on_a_store_without_conditions_nights_and_rollbacks_work_and_say_so_loudly(job, monkeypatch):
    found = Probe(conditional=False, reason="If-Match is ignored")
    monkeypatch.setattr(identity, "probe", lambda _store: found)
    monkeypatch.setattr(channel_command, "probe", lambda _store: found)
    ended = job.call("run")
    assert ended.code == 0, ended.stdout
    (report,) = job.reports().values()
    assert report["promotion"]["outcome"] == "promoted"
    assert report["promotion"]["conditional"] is False
    said = "without conditions on writes, two runs that end in the same two seconds may both promote"
    (note,) = [each for each in report["notes"] if said in each]
    assert "may undo what another has paid or decided meanwhile" in note
    assert ended.named("swap_without_conditions")[0]["level"] == "warning"
    assert job.promoted()["run_id"] == report["run_id"]
    job.in_order()

    back = call("channel", f"file://{job.channel}", "--rollback", "base")
    assert back.code == 0
    assert "swap_without_conditions" in back.stdout + back.stderr
    assert job.promoted()["run_id"] is None
    job.in_order()


# --- who hears of it -------------------------------------------------------------------------------------------------


def test_the_ending_and_the_channel_say_what_came_of_the_night(job):
    uri = f"file://{job.channel}"
    assert call("channel", uri).code == 66
    _, report = job.night()
    (ending,) = [json.loads(path.read_text()) for path in job.store.glob("endings/*")]
    assert ending["promotion"] == {
        "channel": CHANNEL,
        "outcome": "promoted",
        "verdict": "better",
        "challenger": report["run_id"],
        "champion": "the base",
        "why": report["promotion"]["said"],
        "report": f"file://{job.store}/runs/{report['run_id']}/report.json",
        "page": f"file://{job.store}/runs/{report['run_id']}/report.html",
        "also": [],
    }
    page = Path(ending["promotion"]["page"].removeprefix("file://")).read_text(encoding="utf-8")
    assert 'dir="auto">Promoted: ' in page, "it says so first"
    assert '<section id="night"' in page

    shown = call("channel", uri).stdout
    assert f"in use    {report['run_id']}" in shown
    assert "why       Promoted: " in shown
    assert f"copy      {uri}/adapter" in shown
    assert "0.002 of 1 wrong promotions that a year may expect are spent" in shown
    assert shown.count(report["run_id"]) >= 2
    html = job.store / "notes.html"
    told = call("report", f"{uri}/", "--html", str(html))
    assert (told.code, told.stdout) == (0, f"{shown}\npage: {html}\n")
    drawn = html.read_text(encoding="utf-8")
    assert f"{report['run_id']} is in use since" in drawn
    assert [name for name in ("nights", "budget", "work") if f'<title id="{name}-says">' not in drawn] == []
    assert call("report", uri).stdout == shown
    assert call("report", uri, f"file://{job.store}").code == 64
    assert call("report", f"file://{job.store}/channels/nobody").code == 66
    assert call("channel", f"file://{job.store}").code == 64
    assert call("channel", uri, "--rollback", "nobody").code == 66
    assert call("channel", uri, "--rollback", report["run_id"]).code == 64


def test_customers_come_in_pairs():
    assert [row["customer"] for row in with_customers(records(4))] == ["c0", "c0", "c1", "c1"]
