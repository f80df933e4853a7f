"""The page of a run: beside its report, to a file, of a run that is not finished, and of several."""

import json
import shutil

import pytest
from job_process import call

from job.core.errors import DeniedError
from job.core.reports.report import read_report
from job.edge.run.artifacts import Artifacts
from job.render.page.finished import report_html


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[0].only_run(), tmp_path / "store" / "runs" / "copy")


def test_a_finished_run_has_its_page_beside_the_report_made_of_nothing_else(finished):
    run = finished[0].only_run()
    report = read_report(json.loads((run / "report.json").read_bytes()))

    assert (run / "report.html").read_bytes() == report_html(report)


def test_the_report_of_a_run_has_each_held_out_example_s_loss_and_what_the_answers_examples_lost(finished):
    report = read_report(finished[0].report())
    found, (base, *_, last) = report.held_out, report.evaluations

    assert found.examples == len(found.base) == len(found.tuned) == report.data.validation.used
    assert found.gain == pytest.approx(base.loss - report.sweet_spot.loss, abs=1e-6)
    assert len(found.plus_minus) == len(report.evaluations)
    assert last.step == 30
    asked = [answer for answer in report.answers if answer.expected is not None]
    assert [answer.where.rpartition("/")[2] for answer in asked] == ["validation.jsonl:1", "validation.jsonl:2"]
    assert [(answer.base_loss, answer.tuned_loss) for answer in asked] == [
        *zip(found.base[:2], found.tuned[:2], strict=True)
    ]
    assert report.answers[0].where is None
    assert report.data.max_length in {each.tokens for each in report.data.candidates}


def test_report_writes_the_page_to_a_file(run, tmp_path):
    file = tmp_path / "new" / "page.html"
    ended = call("report", f"file://{run}", "--html", str(file))

    assert ended.code == 0, ended.stdout
    assert f"page: {file}" in ended.stdout
    assert file.read_bytes() == (run / "report.html").read_bytes()


def test_the_file_can_be_named_by_the_environment(run, tmp_path, monkeypatch):
    monkeypatch.setenv("JOB_HTML", str(tmp_path / "page.html"))

    assert call("report", f"file://{run}").code == 0
    assert (tmp_path / "page.html").read_bytes().startswith(b"<!DOCTYPE html>")


def test_where_no_run_was_begun_there_is_no_page_and_the_message_says_where_to_look(run, tmp_path):
    uri = f"file://{tmp_path}/store/runs/no-such-run"
    ended = call("report", uri, "--html", str(tmp_path / "page.html"))

    assert ended.code == 66
    assert "what is refused before it begins a run leaves none, and no page" in ended.stdout
    assert f"`report file://{tmp_path}/store` how the last jobs there have ended" in ended.stdout
    assert not (tmp_path / "page.html").exists()


def test_a_file_that_cannot_be_written_ends_74(run, tmp_path):
    (tmp_path / "file").touch()
    ended = call("report", f"file://{run}", "--html", str(tmp_path / "file" / "page.html"))

    assert ended.code == 74
    assert "page.html" in ended.named("ended")[0]["reason"]


def test_a_run_that_failed_has_a_page_of_what_is_committed(job, tmp_path):
    assert job.start("run", "--crash-at", "step.middle:5=error").code == 70
    file = tmp_path / "page.html"
    ended = call("report", f"file://{job.only_run()}", "--html", str(file))
    page = file.read_text()

    assert ended.code == 0, ended.stdout
    assert "not finished: step " in ended.stdout
    assert "The run is not finished: step 4 of 6 is committed." in page
    assert "before training" in page
    assert "ended with 70" in page
    assert "Report it with the log" in page
    assert "<svg" in page
    assert not (job.only_run() / "report.html").exists()


def test_a_run_that_was_stopped_before_its_first_step_has_a_page_too(job, tmp_path):
    assert job.call("run", stop_in="ask_base").code == 75
    file = tmp_path / "page.html"

    assert call("report", f"file://{job.only_run()}", "--html", str(file)).code == 0
    assert "The run is not finished" in file.read_text()


def test_a_checkpoint_that_cannot_be_read_is_passed_over_and_said(job, tmp_path):
    assert job.start("run", "--crash-at", "step.middle:5=error").code == 70
    run = job.only_run()
    for state in run.glob("checkpoints/*/state.json"):
        state.write_bytes(state.read_bytes().replace(b"losses", b"l0sses"))
    file = tmp_path / "page.html"

    assert call("report", f"file://{run}", "--html", str(file)).code == 0
    assert "nothing is committed" in file.read_text()
    assert "was passed over" in file.read_text()


def test_several_runs_are_laid_over_each_other(run, tmp_path):
    other = shutil.copytree(run, run.with_name("other"))
    for name in ("run.json", "report.json"):
        content = json.loads((other / name).read_text())
        content["recipe"]["lora"]["r"] = 64
        (other / name).write_text(json.dumps(content))
    file = tmp_path / "page.html"
    ended = call("report", f"file://{run}", f"file://{other}", "--html", str(file))

    assert ended.code == 0, ended.stdout
    assert f"page: {file}" in ended.stdout
    page = file.read_text()
    assert ">run 1</text>" in page
    assert ">run 2</text>" in page
    assert "lora.r=64" in page


def test_a_page_that_is_denied_costs_a_note_and_never_the_report(job, monkeypatch):
    def publish(artifacts, name, content, published=Artifacts.publish):
        if name == "report.html":
            raise DeniedError("report.html: AccessDenied")
        published(artifacts, name, content)

    monkeypatch.setattr(Artifacts, "publish", publish)
    job.recipe["train"]["steps"] = 2

    assert job.call("run").code == 0
    assert "not written: report.html (report.html: AccessDenied)" in job.report()["notes"]
    assert (job.only_run() / "loss.png").exists()
    ended = call("report", f"file://{job.only_run()}")
    assert (ended.code, "pictures, page: not written" in ended.stdout) == (0, True)


def test_a_run_that_is_at_work_has_a_page_and_is_not_disturbed(job, tmp_path):
    file = tmp_path / "page.html"
    with job.begun("run") as running:
        running.until(lambda event: event["event"] == "checkpoint")
        assert call("report", f"file://{job.only_run()}", "--html", str(file)).code == 0
        assert running.end().code == 0
    assert "is at work, or was killed" in file.read_text()
