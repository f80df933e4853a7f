"""Records in the bucket that somebody changed: obeyed in nothing that the recipe decides, and never a crash."""

import contextlib
import json
import os
from types import SimpleNamespace

import pytest
from hypothesis import given
from job_process import records, write_lines
from tampering import documents

from job.commands.report import look_at, open_run
from job.core.attempt.history import repeated_failure, stopped_in_vain
from job.core.errors import DataError, NotFoundError, RunConflictError
from job.core.recipe.text import load_recipe
from job.core.reports.next_steps import next_steps
from job.edge.run.artifacts import Artifacts
from job.edge.store.directory import DirectoryStore
from job.edge.store.objects import StoreSettings
from job.render.page.finished import report_html
from job.render.page.several import several_html
from job.render.pictures import draw
from job.render.report_text import report_lines
from job.render.runs_table import runs_table
from job.stages.attempts.identity import find_run
from job.stages.finishing.report import _attempts


@pytest.fixture(scope="module")
def begun(tmp_path_factory, base):
    """A run that was stopped before its first step."""
    from job_process import Job

    job = Job(tmp_path_factory.mktemp("begun"), base)
    assert job.call("run", "--run-id", "mine", stop_in="ask_base").code == 75
    return job


@pytest.fixture
def run_json(begun):
    path = begun.only_run() / "run.json"
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


def found(job, run_id):
    recipe = load_recipe(job.write().read_text(), source="r", overrides=[])
    return find_run(recipe, run_id=run_id, settings=StoreSettings(), should_stop=lambda: False)


def test_whatever_run_json_says_only_the_recipe_s_data_is_read(begun, run_json, often):
    allowed = {f"file://{begun.data}/train.jsonl", f"file://{begun.data}/validation.jsonl"}

    @often
    @given(documents(json.loads(run_json.read_bytes())))
    def check(content):
        run_json.write_bytes(content)
        for run_id in ("mine", None):
            with contextlib.suppress(DataError, RunConflictError):
                run = found(begun, run_id)
                assert {o.uri for o in (*run.train, *run.validation)} <= allowed

    check()


OUTSIDE = {
    "another file": "file:///etc/passwd",
    "up and down again": "file://{data}/train/../../../../../../../etc/passwd",
    "another name beside it": "file://{data}/secret.jsonl",
    "a hidden one": "file://{data}/.train.jsonl",
    "deeper": "file://{data}/train/x.jsonl",
    "another store": "s3://bucket/train.jsonl",
    "with a password": "s3://me:secret@bucket/train.jsonl",
    "no store": "gopher://x/y",
    "no text": 7,
}


@pytest.mark.parametrize("kind", OUTSIDE)
@pytest.mark.parametrize("run_id", ["mine", None])
def test_data_that_the_recipe_does_not_name_is_refused_unread(begun, run_json, kind, run_id):
    content = json.loads(run_json.read_bytes())
    uri = OUTSIDE[kind]
    named = uri.format(data=begun.data) if isinstance(uri, str) else uri
    content["data"]["train"].append({"uri": named, "etag": "e", "version": None, "size": 3})
    run_json.write_text(json.dumps(content))
    options = ["--run-id", run_id] if run_id else []
    place = run_json.parent
    if run_id is None:  # found by the recipe's part of its name
        fresh = found(begun, None).artifacts.run_id
        place = place.rename(place.with_name(fresh))
        (place / "run.json").write_text(json.dumps(content | {"run_id": fresh}))
    try:
        ended = begun.call("run", *options)
    finally:
        place.rename(run_json.parent)
    assert ended.code == ended.outcome["code"] == 65, ended.stdout
    assert "run.json: damaged, or changed by somebody (data.train" in ended.outcome["reason"]
    assert "secret@" not in ended.stdout + json.dumps(ended.outcome)


def test_a_frozen_list_still_holds_when_files_are_added(begun):
    more = write_lines(begun.data / "train-2.jsonl", records(3))
    try:
        assert [o.uri for o in found(begun, "mine").train] == [f"file://{begun.data}/train.jsonl"]
    finally:
        more.unlink()


def test_a_data_file_whose_name_is_no_text_ends_65(job):
    (job.data / os.fsdecode(b"train-\xff.jsonl")).write_text("{}\n")
    ended = job.call("run")
    assert ended.code == ended.outcome["code"] == 65, ended.stdout
    assert "the name is not UTF-8" in ended.outcome["reason"]


# --- attempts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["01.json", "01-end.json"])
def test_whatever_an_attempt_s_record_says_the_run_goes_on(begun, name, often):
    path = begun.only_run() / "attempts" / name
    whole = path.read_bytes()
    artifacts = Artifacts(DirectoryStore(begun.store), "mine")
    inputs = SimpleNamespace(artifacts=artifacts, attempt_number=2, device=None)
    facts = SimpleNamespace()

    @often
    @given(documents(json.loads(whole)))
    def check(content):
        path.write_bytes(content)
        attempts = artifacts.attempts()
        stopped_in_vain([*attempts, *attempts])
        repeated_failure([*attempts, *attempts])
        assert [each.number for each in _attempts(inputs, facts)] == [1]
        with contextlib.suppress(DataError, NotFoundError):
            open_run(f"file://{begun.only_run()}")

    try:
        check()
    finally:
        path.write_bytes(whole)


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    from job_process import Job

    job = Job(tmp_path_factory.mktemp("finished"), base)
    job.recipe["train"]["steps"] = 2
    assert job.call("run").code == 0
    return job


@pytest.mark.parametrize(
    "look",
    [
        lambda uri: report_lines(open_run(uri)[1]),
        lambda uri: runs_table([look_at(uri), look_at(uri)]),
        pytest.param(lambda uri: draw(open_run(uri)[1]), marks=pytest.mark.hostile),
        pytest.param(lambda uri: report_html(open_run(uri)[1]), marks=pytest.mark.hostile),
        pytest.param(lambda uri: several_html([look_at(uri), look_at(uri)]), marks=pytest.mark.hostile),
        lambda uri: next_steps(open_run(uri)[1]),
    ],
    ids=["text", "table", "pictures", "page", "page of several", "what to do next"],
)
def test_whatever_a_report_says_it_is_shown_or_refused(finished, look, often):
    path = finished.only_run() / "report.json"
    whole = path.read_bytes()

    @often
    @given(documents(json.loads(whole)))
    def check(content):
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            look(f"file://{finished.only_run()}")

    try:
        check()
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("content", ["{}", '{"run_id": 3}', "[]"])
def test_a_report_that_is_none_ends_65(finished, content):
    path = finished.only_run() / "report.json"
    whole = path.read_bytes()
    path.write_text(content)
    try:
        for ended in (finished.call("run"), finished.call("report")):
            assert ended.code == ended.outcome["code"] == 65, ended.stdout
            assert "report.json" in ended.outcome["reason"]
    finally:
        path.write_bytes(whole)


def test_an_unfinished_run_with_garbage_around_it_is_finished(job):
    """What people alone read, and records of attempts."""
    job.recipe["train"]["steps"] = 2
    assert job.call("run", stop_in="train|evaluate").code == 75
    run = job.only_run()
    (run / "latest.json").write_text('{"step": "\\ud800", "checkpoint": ' + "[" * 900 + "]" * 900 + "}")
    (run / "attempts/01-end.json").write_text('{"exit_code": [1], "step": {}}')
    (run / "attempts/01.json").write_text('{"host": 3}')
    (run / "lock.json").write_text('{"free": true, "fence": 1e400}')
    ended = job.call("run", "--lease-seconds", "1")
    assert ended.code == 0, ended.stdout
    passed_over = {event["record"].rpartition("/")[2] for event in ended.named("attempt_record_passed_over")}
    assert passed_over == {"01.json", "01-end.json"}
    assert [a["exit_code"] for a in job.report()["attempts"]] == [None, 0]
