"""The ending outlives the machine: it stands in the store, whatever the job ended with, and `report` shows it."""

import json
import re
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from job_process import call, objects
from run_material import SECRETS

from job import ending
from job.core.attempt.ended import Ended
from job.core.errors import DeniedError, JobError
from job.edge.run import endings
from job.edge.store.directory import DirectoryStore
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store

NAME = re.compile(r"endings/\d{8}T\d{6}Z-(\d+|none)-[0-9a-f]{8}\.json")


def left(job):
    """Key -> content of each ending, oldest first."""
    keys = [key for key in objects(job.store) if key.startswith("endings/")]
    assert all(NAME.fullmatch(key) for key in keys)
    assert all((job.store / key).stat().st_size < 8192 for key in keys)
    return {key: json.loads((job.store / key).read_text()) for key in keys}


def codes(job):
    return [content["code"] for content in left(job).values()]


def unknown_key(job):
    job.recipe["train"]["learningrate"] = 1
    return job.call("run")


def no_yaml(job):
    path = job.write()
    path.write_text(path.read_text() + "lora: [1\n")
    return call("run", str(path))


def no_recipe(job):
    return call("run", str(job.folder / "nowhere.yaml"), "--output", f"file://{job.store}")


def no_json(job):
    with (job.data / "train.jsonl").open("a") as file:
        file.write("oops\n")
    return job.call("run")


def no_data(job):
    (job.data / "train.jsonl").unlink()
    return job.call("run")


def no_gpu(job):
    return job.call("run", "--device", "cuda")


@pytest.mark.parametrize(
    ("wrong", "code"),
    [(unknown_key, 64), (no_yaml, 64), (no_recipe, 64), (no_json, 65), (no_data, 66), (no_gpu, 82)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_ends_before_its_attempt_has_a_number_leaves_its_ending(job, wrong, code):
    ended = wrong(job)

    assert ended.code == code, ended.stdout
    ((key, content),) = left(job).items()
    assert f"-{code}-" in key
    event = ended.named("ended")[0]
    assert {name: content[name] for name in ("code", "reason", "action", "again")} == {
        "code": code,
        "reason": event["reason"],
        "action": event["action"],
        "again": event["again"],
    }
    assert content["host"]
    assert abs(datetime.fromisoformat(content["time"]) - datetime.now(UTC)) < timedelta(hours=1)
    assert content["recipe"].endswith(".yaml")
    assert job.runs() == []


def test_report_shows_the_last_endings_of_an_output_that_has_no_run(job):
    no_json(job)
    ended = call("report", f"file://{job.store}")

    assert ended.code == 66
    assert "last endings, newest first:" in ended.stdout
    assert " 65 " in ended.stdout
    assert "train.jsonl:25: not JSON" in ended.stdout
    assert "to do: do what the message says" in ended.stdout


def test_report_shows_them_below_the_table_of_runs_and_endings_are_no_runs(job):
    job.recipe["train"]["steps"] = 1
    no_data(job)
    (job.data / "train.jsonl").write_text((job.data / "validation.jsonl").read_text())
    assert job.call("run").code == 0
    assert job.call("run").code == 0  # and nothing was done: it leaves none
    assert sorted(codes(job)) == [0, 66]

    for name in (f"file://{job.store}", f"file://{job.store}/runs", str(job.store)):
        ended = call("report", name)
        assert ended.code == 0, ended.stdout
        lines = ended.stdout.splitlines()
        at = lines.index("last endings, newest first:")
        assert any(line.startswith(job.only_run().name) for line in lines[:at])
        shown = [line.split()[1] for line in lines[at:] if re.match(r"  \d{4}-", line)]
        assert sorted(shown) == ["0", "66"]


@pytest.mark.parametrize("name", ["s3//models", "http://x/y", "nothing here"])
def test_what_is_no_output_is_said_as_before(name):
    said = call("report", name)

    assert said.code == 66
    assert "neither a file nor a run's URI" in said.named("ended")[0]["reason"]


def an_ending(number=0, **facts):
    moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
    known = {"code": 65, "again": "no", "reason": f"reason {number}", "action": "a", "host": "h"}
    return Ended(time=moment.isoformat(timespec="seconds"), **known | facts)


def test_who_may_not_delete_keeps_more(job, monkeypatch):
    opened = open_store(f"file://{job.store}", StoreSettings())
    for number in range(endings.KEPT):
        endings.leave(opened, an_ending(number))

    delete, refused = DirectoryStore.delete, []

    def denied(self, keys):
        keys = [*keys]
        if any(key.startswith("endings/") for key in keys):
            refused.append(keys)
            raise DeniedError("no deletion here")
        delete(self, keys)

    monkeypatch.setattr(DirectoryStore, "delete", denied)
    ended = no_json(job)

    assert ended.code == 65
    assert ended.events[-1]["event"] == "ended"
    assert len(refused) == 1
    assert len(left(job)) == endings.KEPT + 1


def test_who_may_not_write_them_is_said_once_and_ends_as_it_does(job, monkeypatch):
    write = DirectoryStore.write

    def denied(self, key, *arguments, **conditions):
        if key.startswith("endings/"):
            raise DeniedError("no writing here")
        return write(self, key, *arguments, **conditions)

    monkeypatch.setattr(DirectoryStore, "write", denied)
    ended = no_json(job)

    assert ended.code == 65
    assert ended.outcome["code"] == 65
    assert [event["reason"] for event in ended.named("ending_not_written")] == ["no writing here"]
    assert left(job) == {}


@pytest.fixture
def hanging(monkeypatch):
    """A store that never answers when an ending is written; how often it was asked."""
    gate, asked = threading.Event(), []

    def hangs(*_):
        asked.append(time.monotonic())
        gate.wait()

    monkeypatch.setattr(endings, "leave", hangs)
    yield asked
    gate.set()


def test_a_store_that_hangs_is_not_waited_for_beyond_the_time(job, hanging, monkeypatch):
    monkeypatch.setattr(ending, "_WORD_SECONDS", 0.2)
    ended = no_json(job)

    assert ended.code == 65
    assert hanging
    assert "no answer" in ended.named("word_not_left")[0]["reason"]


@pytest.mark.parametrize("option", ["--grace-seconds", "--deadline"])
def test_it_takes_nothing_of_the_time_that_the_end_itself_needs(job, hanging, option):
    """A stop whose grace is as good as over goes on to its end at once."""
    value = "1" if option == "--grace-seconds" else str(time.time() + 1)

    class Stopped(ending.Interrupt):
        signalled, reason = True, "SIGTERM"

        def __call__(self):
            return True

    from job.cli import main

    arguments = job.command("run", option, value)[1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", arguments)
        assert main(Stopped()) == 75
    assert hanging == []


def test_secrets_are_hidden_in_it(job, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    job.recipe["model"]["base"] = f"/nowhere/{SECRETS['HF_TOKEN']}/{SECRETS['MY_API_KEY']}"
    assert job.call("run").code == 66
    (content,) = left(job).values()

    assert "[hidden]" in content["reason"]
    assert not any(value in json.dumps(content) for value in SECRETS.values())


def test_names_that_no_utf_8_can_hold_are_written_all_the_same(job):
    path = job.write().rename(job.folder / "odd-\udcff.yaml")
    path.write_text("model: {bese: x}\n")
    assert call("run", str(path), "--output", f"file://{job.store}").code == 64
    (content,) = left(job).values()

    assert content["recipe"] == "odd-?.yaml"


def test_what_strangers_wrote_into_one_is_not_obeyed_by_the_terminal(job):
    opened = open_store(f"file://{job.store}", StoreSettings())
    endings.leave(opened, an_ending(reason="\x1b[2Jgone\nlast endings", host="h\x1b]0;t\x07", action="\u202eevil"))
    said = call("report", f"file://{job.store}").stdout

    assert not re.search(r"[\x1b\x07\u202e]", said.split('{"timestamp"')[0])
    assert r"\x1b[2Jgone last endings" in said


def test_check_and_the_other_commands_leave_none(job):
    unwritten = job.call("check")
    assert unwritten.code == 0, unwritten.stdout

    assert not job.store.exists() or left(job) == {}


# --- killed without a word --------------------------------------------------------------------------------------------


def test_a_killed_attempt_s_outcome_says_what_is_safe_and_the_next_attempt_leaves_its_ending(job):
    killed = job.start("run", "--crash-at", "report.before")
    run = job.only_run()

    assert killed.code == -9
    assert killed.outcome["state"] == "running"
    assert killed.outcome["run_uri"] == f"file://{run}"
    assert killed.outcome["last_committed_step"] == 6
    assert left(job) == {}

    done = job.start("run")
    assert done.code == 0, done.stdout
    assert done.outcome["state"] == "ended"
    assert sorted(codes(job), key=str) == [0, None]
    (found,) = [content for content in left(job).values() if content["code"] is None]
    assert found["reason"].startswith("ended without a word")
    assert (found["attempt"], found["last_committed_step"], found["run_uri"]) == (1, 6, f"file://{run}")
    assert json.loads((run / "attempts" / "01-end.json").read_text())["exit_code"] is None
    first, second = job.report()["attempts"]
    assert (first["exit_code"], first["ended"], second["exit_code"]) == (None, None, 0)
    assert first["reason"].startswith("ended without a word")
    assert " killed " in call("report", f"file://{job.store}").stdout


def test_it_is_left_once_however_often_the_next_ones_fail(job):
    assert job.start("run", "--crash-at", "step.middle:2").code == -9
    for _ in range(2):
        assert job.start("run", "--crash-at", "model.loaded=error").code == 70

    assert [code for code in codes(job) if code is None] == [None]


def test_a_store_that_refuses_it_does_not_keep_the_next_attempt(job, monkeypatch):
    assert job.start("run", "--crash-at", "step.middle:2").code == -9

    def refuses(*_):
        raise JobError("not now")

    monkeypatch.setattr("job.edge.run.artifacts.Artifacts.end_attempt", refuses)
    ended = job.call("run")

    assert ended.code == 0, ended.stdout
    assert ended.named("attempt_end_not_written")[0]["number"] == 1
