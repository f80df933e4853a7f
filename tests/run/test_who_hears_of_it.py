"""Who hears of a run besides its log: a metrics file, a URL that is notified, the store; nobody unless asked for."""

import json
import signal

import pytest
from job_process import call, objects
from run_material import TOKEN

HANGS = """
import time

import accelerate

accelerate.Accelerator.backward = lambda *_, **__: time.sleep(1e6)
"""


def metrics(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {line.split("{")[0].removeprefix("qlora_job_"): float(line.rpartition(" ")[2]) for line in lines}


def test_a_run_is_followed_to_its_end(job, received):
    url, got = received
    file = job.folder / "qlora.prom"
    ended = job.start("run", JOB_NOTIFY_URL=url, JOB_METRICS_FILE=str(file))
    assert ended.code == 0, ended.stdout

    ((path, notice),) = got
    assert path == f"/{TOKEN}"
    assert (notice["code"], notice["attempt"], notice["last_committed_step"]) == (0, 1, 6)
    assert notice["run_uri"] == f"file://{job.only_run()}"
    assert notice["text"].startswith("qlora-job ended 0 on ")
    (ending,) = [json.loads(file.read_text()) for file in job.store.glob("endings/*")]
    assert ending == {key: value for key, value in notice.items() if key != "text"}

    found = metrics(file)
    assert (found["step"], found["steps"], found["exit_code"], found["running"]) == (6, 6, 0, 0)
    assert found["last_committed_step"] == 6
    assert found["loss"] > 0
    assert found["tokens_per_second"] > 0
    assert f'run_id="{job.only_run().name}"' in file.read_text()

    kept = ended.stdout + ended.stderr + file.read_text() + (job.folder / "outcome.json").read_text()
    kept += "".join((job.store / key).read_text(errors="replace") for key in objects(job.store))
    assert TOKEN not in kept


def test_a_mistake_on_the_command_line_is_heard_of_as_well(job, received, monkeypatch):
    url, got = received
    monkeypatch.setenv("JOB_NOTIFY_URL", url)
    monkeypatch.setenv("JOB_METRICS_FILE", str(job.folder / "qlora.prom"))
    for wrong, told in (("--nonsense", "nonsense"), ("--lease-seconds=x", "lease-seconds")):
        got.clear()
        assert call("run", str(job.write()), wrong).code == 64
        assert [(notice["code"], told in notice["reason"]) for _path, notice in got] == [(64, True)]
        assert metrics(job.folder / "qlora.prom")["exit_code"] == 64


def test_other_commands_notify_nobody(job, received, monkeypatch):
    url, got = received
    monkeypatch.setenv("JOB_NOTIFY_URL", url)
    assert job.call("check").code == 0
    assert call("check", str(job.write()), "--nonsense").code == 64
    assert got == []


@pytest.mark.parametrize("url", ["http://example.com/x-secret", "https://me:x-secret@example.com/"])
def test_a_url_that_is_not_safe_is_refused_at_once(job, url):
    ended = job.start("run", JOB_NOTIFY_URL=url)

    assert ended.code == 64
    assert ended.outcome["code"] == 64
    assert "--notify-url" in ended.outcome["reason"]
    assert "x-secret" not in ended.stdout + ended.stderr
    assert job.runs() == []


def test_whoever_cannot_be_notified_costs_the_run_nothing(job):
    ended = job.start("run", "--set", "train.steps=1", JOB_NOTIFY_URL="http://127.0.0.1:9/x")

    assert ended.code == 0, ended.stdout
    (said,) = ended.named("not_notified")
    assert said["host"] == "127.0.0.1"


def test_nothing_by_default(job):
    before = {path.name for path in job.folder.iterdir()}
    ended = job.call("run", "--set", "train.steps=1")

    assert ended.code == 0
    assert {path.name for path in job.folder.iterdir()} - before == {"store", "work", "outcome.json", "recipe.yaml"}
    assert not any("notified" in event["event"] for event in ended.events)


def test_a_stop_on_request_is_heard_of(job, received):
    url, got = received
    job.recipe["train"]["steps"] = 100_000
    with job.begun("run", "--grace-seconds", "600", JOB_NOTIFY_URL=url) as running:
        running.until(lambda event: event["event"] == "step")
        running.child.send_signal(signal.SIGTERM)
        ended = running.end()

    assert ended.code == 75, ended.stdout
    assert [(notice["code"], notice["signal"]) for _path, notice in got] == [(75, "SIGTERM")]
    assert len([*job.store.glob("endings/*-75-*")]) == 1


def test_a_stall_that_the_watchdog_ends_is_heard_of(job, received):
    url, got = received
    (job.folder / "planted").mkdir()
    (job.folder / "planted" / "sitecustomize.py").write_text(HANGS)
    ended = job.start("run", "--stall-seconds", "4", JOB_NOTIFY_URL=url, PYTHONPATH=str(job.folder / "planted"))

    assert ended.code == 83, ended.stdout
    assert [notice["code"] for _path, notice in got] == [83]
    assert len([*job.store.glob("endings/*-83-*")]) == 1
    for begun in job.store.glob("runs/*/attempts/01.json"):  # it may have stalled before it was an attempt
        assert begun.with_name("01-end.json").exists()
