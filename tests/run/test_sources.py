"""Several sources in one run: drawn in exact shares, resumed to the bit, each counted and judged by itself."""

import json
import signal

import pytest
import yaml
from job_process import Job, call, records, write_lines

STEPS = 200
NUMBERS = ("curve", "evaluations", "sweet_spot", "answers", "exact_match")


def spelled(count, *, seed):
    """Records of another kind, with fields of their own."""
    return [{"ask": row["question"], "say": row["answer"]} for row in records(count, seed=seed)]


def with_sources(job, *, steps=STEPS, shares=({"weight": 3}, {"weight": 1})):
    """Notes by the recipe's templates and chats by their own, held out by content."""
    write_lines(job.data / "chats.jsonl", spelled(40, seed=3))
    job.recipe["data"]["train"] = [
        {"uri": f"file://{job.data}/train*.jsonl", "name": "notes", **shares[0]},
        {"uri": f"file://{job.data}/chats.jsonl", "prompt": "{ask}\n", "completion": "{say}", **shares[1]},
    ]
    job.recipe["data"]["validation"] = {"fraction": 0.3}
    job.recipe["train"] |= {"steps": steps, "batch_size": 4, "learning_rate": 1e-3}
    job.recipe["checkpoint"] = {"every_steps": 25, "keep": 2}
    job.recipe["evaluate"] |= {"every_steps": 50, "answers": 4}
    return job


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, base, warm):
    """An undisturbed run of two sources, three to one; look, do not touch."""
    job = with_sources(Job(tmp_path_factory.mktemp("mixed"), base, warm))
    ended = job.start("run")
    assert ended.code == 0, ended.stdout + ended.stderr
    return job, ended


def test_two_sources_three_to_one_over_200_steps_are_drawn_in_exact_shares(mixed):
    report = mixed[0].report()

    assert [(s["name"], s["examples"], s["share"]) for s in report["plan"]["sources"]] == [
        ("notes", 600, 0.75),
        ("chats.jsonl", 200, 0.25),
    ]
    used = [source["used"] for source in report["data"]["train"]["sources"]]
    assert [s["epochs"] for s in report["plan"]["sources"]] == [600 / used[0], 200 / used[1]]


def test_each_source_is_held_out_by_content_and_counted_by_itself(mixed):
    data = mixed[0].report()["data"]

    for read, side in ((24 + 40, "train"), (24 + 40, "validation")):
        sources = data[side]["sources"]
        assert [source["name"] for source in sources] == ["notes", "chats.jsonl"]
        for key in ("rows", "used", "truncated", "dropped", "without_target", "tokens", "targets"):
            assert sum(source[key] for source in sources) == data[side][key], key
        assert all(0 < source["used"] < read for source in sources)
    for place, count in enumerate((24, 40)):
        assert sum(data[side]["sources"][place]["rows"] for side in ("train", "validation")) == count


def test_the_loss_is_that_of_all_sources_weighted_by_their_tokens(mixed):
    report = mixed[0].report()
    held_out = [source["targets"] for source in report["data"]["validation"]["sources"]]

    for evaluation in report["evaluations"]:
        assert [source["tokens"] for source in evaluation["sources"]] == held_out
        total = sum(source["loss"] * source["tokens"] for source in evaluation["sources"])
        assert total / evaluation["tokens"] == pytest.approx(evaluation["loss"], rel=1e-12)
    first, last = report["evaluations"][0]["sources"], report["evaluations"][-1]["sources"]
    assert all(after["loss"] < before["loss"] for before, after in zip(first, last, strict=True))


def test_answers_are_asked_of_every_source_by_turns(mixed):
    expected = [answer["expected"] for answer in mixed[0].report()["answers"] if answer["expected"] is not None]

    assert len(expected) == 4
    chats = {row["say"] for row in spelled(40, seed=3)} - {row["answer"] for row in records(24)}
    assert sum(answer in chats for answer in expected) >= 1


def test_log_report_and_card_show_each_source(mixed):
    job, ended = mixed
    (dataset,) = ended.named("dataset")
    assert [(source["name"], source["share"]) for source in dataset["sources"]] == [
        ("notes", 0.75),
        ("chats.jsonl", 0.25),
    ]
    assert all(set(event["sources"]) == {"notes", "chats.jsonl"} for event in ended.named("evaluation"))

    shown = call("report", f"file://{job.only_run()}").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert [row[2] for row in rows if row[:1] in (["notes"], ["chats.jsonl"]) and len(row) == 7] == ["75.0%", "25.0%"]
    assert [row[0] for row in rows if row[:1] in (["notes"], ["chats.jsonl"]) and row[3:4] == ["+-"]] == [
        "notes",
        "chats.jsonl",
    ]
    card = (job.only_run() / "adapter" / "README.md").read_text()
    assert "- `notes`: " in card
    assert "75.0% of what was drawn" in card
    assert "| source | held out | loss, base, 95 % | loss, tuned, 95 % |" in card


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_of_two_sources_goes_on_to_the_bit_in_the_middle(job, mixed, kill):
    with_sources(job)
    with job.begun("run") as running:
        running.until(lambda e: e["event"] == "checkpoint" and e["step"] >= 75)
        running.child.send_signal(kill)
        stopped = running.end()
    assert stopped.code in {75, -signal.SIGKILL}
    resumed = job.start("run")
    assert resumed.code == 0, resumed.stdout + resumed.stderr
    (event,) = resumed.named("resumed")
    assert 75 <= event["step"] < STEPS
    report, undisturbed = job.report(), mixed[0].report()

    assert {name: report[name] for name in NUMBERS} == {name: undisturbed[name] for name in NUMBERS}
    weights = "adapter_model.safetensors"
    assert report["adapter"]["files"][weights] == undisturbed["adapter"]["files"][weights]
    assert report["resume_exact"] is True


def test_one_source_in_a_list_trains_what_it_trains_alone(job, tmp_path, base, warm):
    alone = Job(tmp_path / "alone", base, warm)
    listed = Job(tmp_path / "listed", base, warm)
    listed.recipe["data"]["train"] = [{"uri": f"file://{listed.data}/train*.jsonl", "weight": 2}]
    for each in (alone, listed):
        assert each.call("run").code == 0

    first, second = alone.report(), listed.report()
    assert {name: first[name] for name in NUMBERS} == {name: second[name] for name in NUMBERS}
    assert second["data"]["train"]["sources"] == second["plan"]["sources"] == []


# --- which run it is --------------------------------------------------------------------------------------------------


def begin(job, *options):
    ended = job.call("run", *options, stop_in="ask_base")
    assert ended.code == 75, ended.stdout
    return ended


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        (lambda train: train[0].update(weight=2), 2),
        (lambda train: train.reverse(), 2),
        (lambda train: train[1].update(completion=" {say}"), 2),
        (lambda train: train[0].update(name="another name"), 1),
    ],
    ids=["weight", "order", "template", "name"],
)
def test_sources_weights_and_their_order_are_what_a_run_is_and_names_are_not(job, change, runs):
    with_sources(job, steps=4)
    begin(job)
    change(job.recipe["data"]["train"])
    begin(job)
    assert len(job.runs()) == runs


def test_run_json_freezes_the_objects_of_each_source(job):
    with_sources(job, steps=4)
    begin(job)
    frozen = json.loads((job.only_run() / "run.json").read_text())["data"]["train"]
    assert [(o["uri"].rpartition("/")[2], o.get("source", 0)) for o in frozen] == [
        ("train.jsonl", 0),
        ("chats.jsonl", 1),
    ]
    write_lines(job.data / "train-2.jsonl", records(3))
    begin(job)
    assert len(job.runs()) == 1, "a new file waits until the run is done"
    write_lines(job.data / "chats.jsonl", spelled(41, seed=4))
    begin(job)
    assert len(job.runs()) == 2


@pytest.mark.parametrize("kind", ["another source's", "no such source", "none left", "outside"])
def test_what_a_record_says_of_a_source_lies_within_that_source_s_own_uris(job, kind):
    with_sources(job, steps=4)
    begin(job)
    place = job.only_run() / "run.json"
    content = json.loads(place.read_text())
    notes, chats = content["data"]["train"]
    if kind == "another source's":
        content["data"]["train"] = [notes, chats, notes | {"source": 1}]
    elif kind == "no such source":
        content["data"]["train"] = [notes, chats, chats | {"source": 2}]
    elif kind == "none left":
        content["data"]["train"] = [notes]
    else:
        content["data"]["train"] = [notes, chats, chats | {"uri": "file:///etc/passwd"}]
    place.write_text(json.dumps(content))
    ended = job.call("run")
    assert ended.code == 65, ended.stdout
    assert "run.json: damaged, or changed by somebody (data.train" in ended.outcome["reason"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_wrong_lines_of_each_source_are_reported_together(job):
    with_sources(job, steps=4)
    write_lines(job.data / "train.jsonl", [*records(24), {"question": "1"}])
    write_lines(job.data / "chats.jsonl", [*spelled(40, seed=3), {"ask": "1"}])
    ended = job.call("run")
    assert ended.code == 65
    assert "2 wrong lines of 66" in ended.outcome["reason"]
    assert 'train.jsonl:25: "answer" is missing' in ended.outcome["reason"]
    assert 'chats.jsonl:41: "say" is missing' in ended.outcome["reason"]


def test_a_source_that_is_too_noisy_is_refused_however_clean_the_others_are(job):
    with_sources(job, steps=4)
    job.recipe["data"] |= {"on_bad_record": "skip", "bad_record_limit": 0.05}
    write_lines(job.data / "train.jsonl", records(500))
    write_lines(job.data / "chats.jsonl", [*spelled(9, seed=3), {"ask": "1"}])
    ended = job.call("run")
    assert ended.code == 65
    assert "1 of 10 lines of data.train: chats.jsonl are wrong (10.00%)" in ended.outcome["reason"]


def test_a_source_without_an_example_to_train_on_is_refused_by_name(job):
    with_sources(job, steps=4)
    job.recipe["data"] |= {"max_length": 8, "too_long": "drop", "unused_limit": 1.0}
    long = {"ask": "12 red hats " * 9, "say": "red 12"}
    write_lines(job.data / "chats.jsonl", [long | {"say": f"red {n}"} for n in range(10, 60)])
    ended = job.call("run")
    assert ended.code == 65
    assert "no example of the source chats.jsonl is left to train on" in ended.outcome["reason"]


def test_a_source_of_which_too_much_is_left_out_is_refused_by_name(job):
    with_sources(job, steps=4)
    job.recipe["data"] |= {"max_length": 8, "too_long": "drop"}
    long = {"ask": "12 red hats " * 9, "say": "red 12"}
    write_lines(job.data / "chats.jsonl", [*spelled(20, seed=3), *[long | {"say": f"red {n}"} for n in range(10, 20)]])
    ended = job.call("run")
    assert ended.code == 65
    assert "data.train: chats.jsonl: 10 of 30 examples are left out (33.3%)" in ended.outcome["reason"]


def test_a_source_that_would_never_be_drawn_is_refused(job):
    with_sources(job, steps=4, shares=({"weight": 1000}, {"weight": 1}))
    ended = job.call("run")
    assert ended.code == 64
    assert "the source chats.jsonl, whose share is 0.000999, is never drawn" in ended.outcome["reason"]


def test_a_source_of_which_nothing_is_held_out_is_noted(job):
    with_sources(job, steps=4)
    job.recipe["data"]["validation"] = [
        {"uri": f"file://{job.data}/validation.jsonl", "name": "notes"},
        {"uri": f"file://{job.data}/held.jsonl", "prompt": "{ask}\n", "completion": "{say}"},
    ]
    job.recipe["evaluate"]["max_examples"] = 1
    write_lines(job.data / "held.jsonl", spelled(1, seed=9))
    assert job.call("run").code == 0
    report = job.report()
    losses = report["evaluations"][-1]["sources"]
    (empty,) = [source["name"] for source in losses if not source["examples"]]
    assert any(f"no held-out example is from the source {empty}" in note for note in report["notes"])
    assert [source["loss"] is None for source in losses if source["name"] == empty] == [True]


# --- the other commands -----------------------------------------------------------------------------------------------


def test_check_has_a_row_for_each_source(job):
    with_sources(job, shares=({"epochs": 2}, {}))
    del job.recipe["train"]["steps"]
    job.recipe["train"]["epochs"] = 3
    ended = job.call("check")
    assert ended.code == 0, ended.stdout
    rows = [line for line in ended.stdout.splitlines() if "training examples," in line]
    assert ["notes" in rows[0], "chats.jsonl" in rows[1]] == [True, True]
    assert "6 epochs" in rows[0]
    assert "3 epochs" in rows[1]


def test_check_without_a_base_looks_at_the_lines_of_each_source_by_its_own_templates(job):
    with_sources(job)
    job.recipe["model"] = {"base": str(job.folder / "nowhere")}
    ended = job.call("check")
    assert ended.code == 66
    assert "64 right lines, 0 wrong ones" in ended.stdout


def test_plan_shows_each_source(job):
    with_sources(job)
    shown = job.call("plan", "--gpu-memory", "80")
    assert shown.code == 0, shown.stdout
    assert "75.0% of each step's" in shown.stdout
    values = json.loads(job.call("plan", "--gpu-memory", "80", "--json").stdout)
    assert [(s["name"], s["share"]) for s in values["work"]["sources"]] == [("notes", 0.75), ("chats.jsonl", 0.25)]


def test_the_recipe_that_fetch_writes_has_the_same_sources(job, tmp_path):
    with_sources(job, steps=4)
    job.recipe["data"]["validation"] = [{"uri": f"file://{job.data}/validation.jsonl"}]
    assert job.call("fetch", "--to", str(tmp_path / "offline")).code == 0
    written = yaml.safe_load((tmp_path / "offline" / "recipe.yaml").read_text())
    train = written["data"]["train"]
    assert [(source["name"], source["weight"]) for source in train] == [("notes", 3.0), ("chats.jsonl", 1.0)]
    assert (train[1]["prompt"], train[1]["completion"]) == ("{ask}\n", "{say}")
    job.recipe = written
    ended = job.call("run")
    assert ended.code == 0, ended.stdout
    assert [source["name"] for source in job.report()["plan"]["sources"]] == ["notes", "chats.jsonl"]
