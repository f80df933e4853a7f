"""What a run says of single examples, with two processes: one's figures, each example's line once and in its place."""

import json

import pytest
from hub_stand_in import hub_stand_in
from job_process import Job, call, records, write_lines
from many_processes import nothing_is_left
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.core.judging.example_results import EXAMPLES_JSONL


def with_languages(rows):
    return [row | {"lang": ("de", "en")[n % 3 == 0]} for n, row in enumerate(rows)]


def judged(folder, base, warm):
    """Everything that a recipe can ask for of single examples, and all that is done with them at the end."""
    job = Job(folder, base, warm)
    write_lines(job.data / "train.jsonl", with_languages(records(24)))
    write_lines(job.data / "validation.jsonl", with_languages(records(30, seed=1)))
    job.recipe["lora"]["dropout"] = 0.0
    job.recipe["train"] |= {"steps": 8, "batch_size": 8}
    job.recipe["evaluate"] |= {
        "every_steps": 4,
        "answers": 25,
        "metric": "pattern",
        "pattern": "([a-z]+|[0-9]+)$",
        "slices": ["lang"],
        "prompts": ["12 red", "13 blue", "14 green"],
    }
    job.recipe["track"] = {"trackers": ["tensorboard"]}
    job.recipe["output_hub"] = "someone/notes"
    return job


def carried(job, *options):
    """The run to its end; what its hub has, and how often the hub was asked who asks."""
    with hub_stand_in() as hub:
        with job.begun("run", *options, cold=True, **hub.environment()) as running:
            supervisor = running.child.pid
            ended = running.end()
        assert ended.code == 0, ended.stdout + ended.stderr
        assert nothing_is_left(supervisor)
        return ended, hub.repositories["someone/notes"].files, hub.asked


def lines_of(job):
    return [json.loads(line) for line in (job.only_run() / EXAMPLES_JSONL).read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base, warm):
    job = judged(tmp_path_factory.mktemp("alone"), base, warm)
    return job, *carried(job)


@pytest.mark.parametrize("placement", ["replicated", pytest.param("sharded", marks=pytest.mark.ranks)])
def test_two_processes_judge_each_example_as_one_does_and_one_of_them_says_so(placement, alone, tmp_path, base, warm):
    job = judged(tmp_path, base, warm)
    ended, pushed, asked = carried(job, "--gpus", "2", "--base-placement", placement)
    theirs, _, their_pushed, their_asked = alone
    report, other = job.report(), theirs.report()
    assert (report["throughput"]["ranks"], report["throughput"]["placement"]) == (2, placement)

    # Before the first step all is the same, whoever has judged it: each example's line is once and in its place.
    mine, its = lines_of(job), lines_of(theirs)
    for name in ("example", "where", "tokens", "base_loss", "base_score"):
        assert [line[name] for line in mine] == [line[name] for line in its], name
    assert [line["tuned_loss"] for line in mine] == pytest.approx([line["tuned_loss"] for line in its], rel=2e-2)
    assert sum(line["base_score"] is not None for line in mine) == 25
    assert [a["base"] for a in report["answers"]] == [a["base"] for a in other["answers"]]
    assert report["evaluations"][0] == other["evaluations"][0]
    assert [each["slice"] for each in report["evaluations"][0]["slices"]] == [
        each["slice"] for each in other["evaluations"][0]["slices"]
    ]
    metric, their_metric = report["metric"], other["metric"]
    assert metric["scores"]["before"] == their_metric["scores"]["before"]
    assert metric["scores"]["examples"] == their_metric["scores"]["examples"] == 25
    assert report["per_example"]["validation"] == other["per_example"]["validation"]

    # Rank 0 alone speaks: to the log, to trackers, to the store and to the hub.
    assert len(ended.named("metric")) == len(ended.named("pushed")) == len(ended.named("hub")) == 1
    assert {*pushed} == {*their_pushed}
    assert pushed["report.json"] == (job.only_run() / "report.json").read_bytes()
    assert asked.total() == their_asked.total()
    assert sum(n for what, n in asked.items() if "whoami" in what) == sum(
        n for what, n in their_asked.items() if "whoami" in what
    )
    folder = job.only_run() / "tensorboard"
    assert len([*folder.iterdir()]) == len([*(theirs.only_run() / "tensorboard").iterdir()])
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [*range(1, 9)]
    assert "Answers by lang" in (job.only_run() / "report.html").read_text()
    assert not (job.workdir / "trackers").exists() or not [*(job.workdir / "trackers").iterdir()]

    to = tmp_path / "merged"
    merged = call("export", str(job.only_run()), "--to", str(to), "--workdir", str(job.workdir))
    assert merged.code == 0, merged.stdout
    losses = json.loads((to / "export.json").read_text())["losses"]
    assert losses["examples"] == 30
    assert losses["merged"] == pytest.approx(losses["unmerged"], rel=1e-2)
