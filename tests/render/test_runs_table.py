"""Several runs side by side: what differs, which is best, and when that cannot be said."""

import re
from dataclasses import replace

import pytest

from job.render.runs_table import RunRow, newest_first, runs_table

BEGUN = "2025-01-31T04:00:00+00:00"


@pytest.fixture
def row(report):
    """A finished run with these values in its recipe and this tuned loss."""

    def make(run_id, loss=1.25, *, finished=True, standing="finished", **recipe):
        spot = report.sweet_spot.model_copy(update={"loss": loss})
        found = report.model_copy(update={"run_id": run_id, "sweet_spot": spot})
        began = standing != "not there"
        return RunRow(
            run_id=run_id,
            recipe=recipe,
            report=found if finished else None,
            standing=standing,
            begun=BEGUN if began else None,
            seconds=750.0 if began else None,
            objects=2 * began,
            bytes=1_500_000 * began,
        )

    return make


def cells(line):
    return re.split(r"\s{2,}", line.strip())


def test_each_run_has_a_line_and_the_lowest_tuned_loss_is_best(row):
    rows = [row("aa", 1.5, lora={"r": 8}), row("bb", 1.25, lora={"r": 16}), row("cc", 1.75, lora={"r": 32})]
    lines = runs_table(rows)

    assert cells(lines[0])[:5] == ["run", "begun (UTC)", "minutes", "data", "differs in"]
    assert cells(lines[0])[5:] == ["base loss", "tuned loss", "step", "exact match", "tokens/s"]
    assert cells(lines[1])[:4] == ["aa", "2025-01-31 04:00", "12.5", "1,000+120 examples"]
    assert cells(lines[1])[4:8] == ["lora.r=8", "2.5000", "1.5000", "50"]
    assert cells(lines[2])[8] == "0% -> 95%"
    assert [line.endswith("<- best") for line in lines[1:4]] == [False, True, False]
    assert lines[-1].startswith("best: bb (lora.r=16), the lowest tuned loss, 1.2500 beside 1.5000 of aa: s3://")


def test_only_what_is_not_the_same_everywhere_is_told_of_the_recipes(row):
    recipe = {"model": {"base": "x"}, "train": {"steps": 100, "learning_rate": 0.1}}
    other = {"model": {"base": "x"}, "train": {"steps": 100, "learning_rate": 0.2}}
    lines = runs_table([row("aa", 2.0, **recipe), row("bb", 1.0, **other)])

    assert cells(lines[1])[4] == "train.learning_rate=0.1"
    assert cells(lines[2])[4] == "train.learning_rate=0.2"
    assert "steps" not in "".join(lines)


def test_a_key_that_only_some_recipes_have_is_told_of_those(row):
    lines = runs_table([row("aa", 1.0, data={"chat": "messages"}), row("bb", 2.0, data={"text": "{x}"})])

    assert cells(lines[1])[4] == "data.chat=messages"
    assert cells(lines[2])[4] == "data.text={x}"


def test_a_run_without_a_report_is_told_as_what_it_is_and_is_never_best(row):
    rows = [
        row("aa", 1.5, lora={"r": 8}),
        row("bb", 0.1, lora={"r": 16}, finished=False, standing="not finished: step 20 is committed"),
        row("cc", finished=False, standing="not there"),
    ]
    lines = runs_table(rows)

    assert lines[1].endswith("<- best")
    assert cells(lines[2])[3:] == ["2 files, 1.5 MB", "lora.r=16", "not finished: step 20 is committed"]
    assert cells(lines[3]) == ["cc", "-", "-", "-", "not there"]


def test_runs_that_were_judged_on_different_data_have_no_best(row):
    one, other = row("aa", 1.5), row("bb", 1.25)
    objects = tuple(o.model_copy(update={"sha256": "cd" * 32}) for o in other.report.data.validation.objects)
    side = other.report.data.validation.model_copy(update={"objects": objects})
    data = other.report.data.model_copy(update={"validation": side})
    elsewhere = RunRow(
        run_id="bb", recipe={}, report=other.report.model_copy(update={"data": data}), standing="finished"
    )
    lines = runs_table([one, elsewhere])

    assert not any(line.endswith("<- best") for line in lines)
    assert lines[-1].startswith("best: none; the runs were judged on different data")
    assert runs_table([one, other])[-1].startswith("best: bb")


def test_another_base_model_has_other_tokens_and_so_no_comparable_loss(row):
    one, other = row("aa", 1.5), row("bb", 1.25)
    model = other.report.model.model_copy(update={"revision": "f" * 40})
    changed = RunRow(
        run_id="bb", recipe={}, report=other.report.model_copy(update={"model": model}), standing="finished"
    )

    assert "best: none" in runs_table([one, changed])[-1]


def test_without_a_finished_run_there_is_no_best(row):
    assert runs_table([row("aa", finished=False, standing="not there")])[-1] == "best: none; no run is finished"


def test_without_exact_match_there_is_a_dash(row):
    bare = row("aa")
    bare = RunRow(
        run_id="aa", recipe={}, report=bare.report.model_copy(update={"exact_match": None}), standing="finished"
    )

    assert cells(runs_table([bare, row("bb", 9.0)])[1])[-3] == "-"


def test_the_newest_runs_come_first_and_those_that_were_not_begun_last(row):
    began = {"aa": "2025-01-30T04:00:00+00:00", "bb": "2025-01-31T04:00:00+00:00", "cc": None}
    rows = [replace(row(name), begun=when) for name, when in began.items()]

    assert [each.run_id for each in newest_first(rows, most=None)] == ["bb", "aa", "cc"]
    assert [each.run_id for each in newest_first(rows, most=1)] == ["bb"]


def test_where_a_line_has_no_room_a_run_has_two_and_says_the_same(row):
    rows = [
        row("a29da3443a-1f4d73a06a", 1.5, lora={"r": 8}),
        row("b29da3443a-1f4d73a06a", lora={"r": 16}, finished=False, standing="not finished: nothing is committed"),
    ]
    wide, narrow = runs_table(rows), runs_table(rows, width=80)

    assert narrow[1].endswith("1,000+120 examples  <- best")
    assert narrow[2:4] == [
        "    base loss 2.5000, tuned loss 1.5000, step 50, exact match 0% -> 95%, tokens/s 4,000",
        "    lora.r=8",
    ]
    assert narrow[4].endswith("2 files, 1.5 MB")
    assert narrow[5:7] == ["    not finished: nothing is committed", "    lora.r=16"]
    said = [set(re.findall(r"[\w.%=>-]+", "\n".join(lines))) for lines in (wide, narrow)]
    assert said[0] - said[1] == {"differs", "in"}
