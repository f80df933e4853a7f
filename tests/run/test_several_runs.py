"""report of several runs, of a recipe's run, and of runs that are not finished."""

import json
import os
import re
import shutil
from datetime import datetime

import pytest
from job_process import call

from job.commands import report


def begun(run, started):
    """A run as if its first attempt had started then, by its own word and by the store's clock."""
    record = run / "attempts" / "01.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"started": started}))
    moment = datetime.fromisoformat(started).timestamp()
    os.utime(run / "run.json", (moment, moment))


@pytest.fixture
def two(finished, tmp_path):
    """A store with two finished runs that differ in one key and in how well they did."""
    job, _ended = finished
    runs = tmp_path / "store" / "runs"
    for name, rank, loss in (("aa-1", 4, 3.5), ("bb-2", 8, 1.5)):
        run = shutil.copytree(job.only_run(), runs / name)
        for file in ("run.json", "report.json"):
            content = json.loads((run / file).read_text())
            content["run_id"] = name
            content["recipe"]["lora"]["r"] = rank
            if file == "report.json":
                content["sweet_spot"]["loss"] = loss
                content["run_uri"] = f"file://{run}"
            (run / file).write_text(json.dumps(content))
    begun(runs / "aa-1", "2025-01-31T04:00:00+00:00")
    begun(runs / "bb-2", "2025-01-30T04:00:00+00:00")
    return runs


def named(line):
    return line.split("  ")[0]


def unfinished(runs):
    """The second run, as it stands before its end."""
    for name in ("report.json", "adapter"):
        shutil.rmtree(runs / "bb-2" / name) if name == "adapter" else (runs / "bb-2" / name).unlink()


def test_several_runs_are_a_table_with_what_differs_and_the_best(two):
    ended = call("report", f"file://{two}/aa-1", f"file://{two}/bb-2/report.json")

    assert ended.code == 0, ended.stdout
    lines = ended.stdout.splitlines()
    assert [named(line) for line in lines[1:3]] == ["aa-1", "bb-2"]
    assert "lora.r=4" in lines[1]
    assert "3.5000" in lines[1]
    assert "lora.r=8" in lines[2]
    assert lines[2].endswith("<- best")
    assert "best: bb-2 (lora.r=8)" in lines[-1]


@pytest.mark.parametrize("tail", ["", "/", "/*"])
def test_all_runs_of_an_output_are_named_by_their_folder(two, tail):
    ended = call("report", f"file://{two}{tail}")

    assert ended.code == 0
    assert [named(line) for line in ended.stdout.splitlines()[1:3]] == ["aa-1", "bb-2"]


def test_a_pattern_chooses_among_them(two):
    lines = call("report", f"file://{two}/b*").stdout.splitlines()

    assert named(lines[1]) == "bb-2"
    assert not any(line.startswith("aa-1") for line in lines)


def test_a_file_holds_one_run_a_line(two, tmp_path):
    file = tmp_path / "runs.txt"
    file.write_text(f"# a sweep\nfile://{two}/bb-2\n\nfile://{two}/aa-1\n")
    ended = call("report", str(file))

    assert ended.code == 0
    assert {named(line) for line in ended.stdout.splitlines()[1:3]} == {"bb-2", "aa-1"}


def test_the_newest_run_comes_first_with_its_date_its_data_and_its_minutes(two):
    begun(two / "aa-1", "2025-01-30T04:00:00+00:00")
    begun(two / "bb-2", "2025-02-01T04:00:30+00:00")
    end = two / "bb-2" / "attempts" / "01-end.json"
    end.write_text(json.dumps(json.loads(end.read_text()) | {"ended": "2025-02-01T04:03:00+00:00"}))
    lines = call("report", f"file://{two}").stdout.splitlines()

    assert [named(line) for line in lines[1:3]] == ["bb-2", "aa-1"]
    assert re.split(r"  +", lines[1])[1:4] == ["2025-02-01 04:00", "2.5", "24+6 examples"]


@pytest.mark.parametrize("name", ["file://{two}", "file://{two}/*", "{file}"])
def test_the_last_runs_are_those_that_were_begun_last(two, tmp_path, name):
    begun(two / "aa-1", "2025-01-30T04:00:00+00:00")
    begun(two / "bb-2", "2025-01-31T04:00:00+00:00")
    file = tmp_path / "runs.txt"
    file.write_text(f"file://{two}/aa-1\nfile://{two}/bb-2\n")
    lines = call("report", name.format(two=two, file=file), "--last", "1").stdout.splitlines()

    assert [named(line) for line in lines[1:]][:2] == ["bb-2", ""]


def test_of_many_runs_only_the_last_ones_are_read(two, monkeypatch):
    for number in range(10):
        begun(shutil.copytree(two / "aa-1", two / f"cc-{number}"), f"2025-01-{number + 1:02d}T04:00:00+00:00")
    looked_at = []
    monkeypatch.setattr(report, "look_at", lambda uri, look=report.look_at: looked_at.append(uri) or look(uri))
    call("report", f"file://{two}/cc-*", "--last", "2")

    assert looked_at == [f"file://{two}/cc-9", f"file://{two}/cc-8"]


def test_a_run_that_is_not_finished_is_told_in_the_table_and_by_the_exit_code(two):
    unfinished(two)
    ended = call("report", f"file://{two}")

    assert ended.code == 66
    lines = ended.stdout.splitlines()
    assert lines[1].endswith("<- best")
    assert "not finished: step 30 is committed, attempt 1: exit 0" in lines[2]


def test_a_run_that_is_not_there_is_told_as_well(two):
    ended = call("report", f"file://{two}/aa-1", f"file://{two}/zz-9")

    assert ended.code == 66
    assert "not there" in ended.stdout


@pytest.mark.parametrize("name", ["file:///nowhere/runs", "file:///nowhere/runs/a*"])
def test_a_name_that_means_no_run_ends_66(name):
    ended = call("report", name)

    assert ended.code == 66
    assert name in ended.named("ended")[0]["reason"]


def test_an_empty_file_ends_66(tmp_path):
    (tmp_path / "runs.txt").write_text("# none yet\n")

    assert call("report", str(tmp_path / "runs.txt")).code == 66


def test_a_table_leaves_nothing_in_the_store(two):
    before = sorted((p, p.stat().st_mtime_ns) for p in two.rglob("*"))
    call("report", f"file://{two}")

    assert sorted((p, p.stat().st_mtime_ns) for p in two.rglob("*")) == before


# --- by its recipe ---------------------------------------------------------------------------------------------------


def test_a_recipe_names_the_run_that_it_would_make_now(finished):
    job, _ended = finished
    ended = call("report", str(job.recipe_path))

    assert ended.code == 0, ended.stdout
    assert f"run {job.only_run().name}" in ended.stdout


def test_with_other_data_or_another_override_that_run_is_not_there(finished, tmp_path):
    """So exit 0 means: nothing changed, `run` would do nothing."""
    job, _ended = finished
    assert call("report", str(job.recipe_path), "--set", "lora.r=2").code == 66

    more = job.data / "train-more.jsonl"
    more.write_text('{"question": "12 red hats", "answer": "red 12"}\n')
    try:
        ended = call("report", str(job.recipe_path))
    finally:
        more.unlink()
    assert ended.code == 66
    said = ended.named("ended")[0]
    assert "the run is not there: the recipe and its data, as they are now, have not been begun" in said["reason"]
    assert said["reason"].endswith(f"finished in file://{job.store}: {job.only_run().name}")
    assert said["action"] == "start `run` with the recipe, or ask for `report` of a finished run by its URI"


def test_an_unfinished_run_of_the_recipe_is_told_as_such(job):
    job.call("run", stop_in="ask_base")
    ended = call("report", str(job.recipe_path))

    assert ended.code == 66
    said = ended.named("ended")[0]
    assert "not finished yet (nothing is committed, attempt 1: exit 75)" in said["reason"]
    assert "goes on where it stands" in said["action"]


def test_a_recipe_of_no_run_yet_is_told_as_such(job):
    said = call("report", str(job.write())).named("ended")[0]

    assert said["exit_code"] == 66
    assert "have not been begun" in said["reason"]
    assert said["reason"].endswith(f"no run is finished in file://{job.store}")


def test_the_finished_runs_are_named_newest_first_and_not_without_end(two, monkeypatch):
    newer, older = sorted(path.name for path in two.iterdir())[:2]
    os.utime(two / newer / "report.json", (2e9, 2e9))
    os.utime(two / older / "report.json", (1e9, 1e9))
    said = call("report", f"file://{two}/nothing").named("ended")[0]["reason"]
    assert said.endswith(f"finished in file://{two.parent}: {newer}, {older}")
    monkeypatch.setattr(report, "_LISTED", 1)
    assert call("report", f"file://{two}/nothing").named("ended")[0]["reason"].endswith(f": {newer} and 1 more")


def test_a_wrong_recipe_ends_64(job):
    job.recipe["lora"]["rank"] = 4
    ended = call("report", str(job.write()))

    assert ended.code == 64
