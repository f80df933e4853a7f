"""Trackers are heard in order and in one run over all attempts; none of them costs the run anything but a warning."""

import importlib.util
import shutil
import subprocess
import sys
import threading
import time
import types
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.core.errors import SickDeviceError, UsageError
from job.core.recipe.schema import TrackSection
from job.tune.device.device import choose_device, device_memory, device_name, peak_memory_bytes
from job.tune.loop import track
from job.tune.loop.track import Tracking, refuse_trackers
from job.tune.loop.trackers import TRACKERS, Conclusion, TrackedRun, Values

FIGURES = {"final/validation_loss": 1.25, "final/chosen_step": 2}
LONG = 60.0
"""Seconds that nothing here takes: what waits for them hangs."""


def tracked_run(folder, *, history=()):
    return TrackedRun(
        key="r1-0a0b0c0d",
        name="r1",
        uri="s3://models/runs/r1",
        project="notes",
        folder=folder,
        facts={"model.base": "tiny/base", "lora.r": 8},
        history=[Values(step=step, time=1.0, numbers=numbers) for step, numbers in history],
    )


def conclusion(folder):
    folder.mkdir(exist_ok=True)
    page = folder / "report.html"
    page.write_text("<!DOCTYPE html><p>the page</p>")
    return Conclusion(step=3, figures=FIGURES, verdict="It learned.", page=page)


class Fake:
    """A tracker that does as it is asked."""

    name = "fake"
    children = ()

    def __init__(self):
        self.heard, self.batches = [], []
        self.may_go = threading.Event()
        self.may_go.set()
        self.fails_in = None
        self.has = {}
        """Name of a number: the last step that it knows of it."""

    def _do(self, what, *facts):
        self.may_go.wait(LONG)
        if self.fails_in == what:
            raise RuntimeError(f"{what} was not to be")
        self.heard.append((what, *facts))

    def open(self, run):
        self._do("open", run.key)
        return lambda name: self.has.get(name, -1)

    def log(self, batch):
        self.batches.append(len(batch))
        for values in batch:
            self._do("log", values.step, values.numbers["train/loss"])

    def conclude(self, found):
        self._do("conclude", found.verdict)

    def close(self, ended):
        self._do("close", ended)


@pytest.fixture
def fakes(monkeypatch):
    """Two trackers that a recipe could name, and their making."""
    made = {"one": Fake(), "other": Fake()}
    for name, fake in made.items():
        fake.name = name
        monkeypatch.setitem(TRACKERS, name, lambda fake=fake: fake)
    return made


def follow(names, folder, *, steps=3, seconds=LONG, end="finished"):
    """One attempt; returns what was warned of."""
    warned = []
    tracking = Tracking(names, on_failure=warned.append)
    tracking.begin(tracked_run(folder))
    for step in range(1, steps + 1):
        tracking.log({"train/loss": 4.0 - step}, step=step)
    tracking.conclude(conclusion(folder))
    tracking.end(end, seconds=seconds)
    return warned


def test_what_is_sent_is_heard_in_order_by_each(fakes, tmp_path):
    assert follow(["one", "other"], tmp_path) == []
    for fake in fakes.values():
        assert fake.heard == [
            ("open", "r1-0a0b0c0d"),
            *(("log", step, 4.0 - step) for step in (1, 2, 3)),
            ("conclude", "It learned."),
            ("close", "finished"),
        ]


def test_a_tracker_that_is_behind_is_sent_many_steps_at_once_and_misses_none(fakes, tmp_path):
    fakes["one"].may_go.clear()
    warned = []
    tracking = Tracking(["one"], on_failure=warned.append)
    tracking.begin(tracked_run(tmp_path))
    for step in range(500):
        tracking.log({"train/loss": 1.0}, step=step)
    fakes["one"].may_go.set()
    tracking.end("finished", seconds=LONG)

    assert warned == []
    assert [step for what, step, *_ in fakes["one"].heard if what == "log"] == [*range(500)]
    assert len(fakes["one"].batches) <= 4


@pytest.mark.parametrize("what", ["open", "log", "conclude", "close"])
def test_a_tracker_that_fails_is_reported_once_and_the_other_hears_all(fakes, tmp_path, what):
    fakes["one"].fails_in = what
    assert follow(["one", "other"], tmp_path) == [f"tracking by one stopped: RuntimeError: {what} was not to be"]
    assert len(fakes["other"].heard) == 6


def test_a_tracker_that_hangs_keeps_nobody_beyond_the_time(fakes, tmp_path):
    fakes["one"].may_go.clear()
    began = time.monotonic()
    warned = follow(["one", "other"], tmp_path, seconds=0.2)
    took = time.monotonic() - began
    fakes["one"].may_go.set()

    assert warned == ["tracking by one stopped: it did not take all that it was sent within 0 s"]
    assert took < LONG / 2
    assert fakes["other"].heard[-1] == ("close", "finished")


def test_a_step_is_handed_over_without_waiting_and_one_too_many_ends_it(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(track, "_MOST_WAITING", 10)
    fakes["one"].may_go.clear()
    warned = []
    tracking = Tracking(["one"], on_failure=warned.append)
    tracking.begin(tracked_run(tmp_path))
    for step in range(100):
        tracking.log({"train/loss": 1.0}, step=step)

    assert warned == ["tracking by one stopped: it is 10 steps behind"]
    fakes["one"].may_go.set()
    tracking.end("failed", seconds=LONG)


def test_what_a_tracker_has_started_does_not_outlive_it(fakes, tmp_path):
    """W&B's own program would keep the process from ending for as long as its server is away."""
    program = Path(shutil.copy(shutil.which("sleep"), tmp_path / "core-of-one"))
    fakes["one"].children = (program.name,)
    fakes["one"].may_go.clear()
    with subprocess.Popen([program, str(LONG)]) as started, subprocess.Popen(["sleep", str(LONG)]) as beside:
        follow(["one"], tmp_path, seconds=0.1)
        code = started.wait(LONG / 2)
        assert beside.poll() is None
        beside.kill()
    fakes["one"].may_go.set()

    assert code == -9


def test_what_a_tracker_lacks_of_earlier_attempts_it_is_sent_first(fakes, tmp_path):
    """It was away, or its last words were lost with the machine."""
    fakes["one"].has = {"train/loss": 1}
    history = [(step, {"train/loss": float(step)}) for step in (1, 2, 3)]
    tracking = Tracking(["one", "other"], on_failure=pytest.fail)
    tracking.begin(tracked_run(tmp_path, history=history))
    tracking.log({"train/loss": 4.0}, step=4)
    tracking.end("stopped", seconds=LONG)

    heard = {name: [step for what, step, *_ in fake.heard if what == "log"] for name, fake in fakes.items()}
    assert heard == {"one": [2, 3, 4], "other": [1, 2, 3, 4]}


def test_without_trackers_nothing_is_begun(tmp_path):
    threads = threading.active_count()

    assert follow([], tmp_path) == []
    assert threading.active_count() == threads


def test_the_watch_over_the_attempt_sees_that_it_waits(fakes, tmp_path):
    fakes["one"].may_go.clear()
    beats = []
    tracking = Tracking(["one"], on_failure=lambda _: None, on_beat=lambda: beats.append(1))
    tracking.begin(tracked_run(tmp_path))
    tracking.end("failed", seconds=0.2)
    fakes["one"].may_go.set()

    assert beats


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else object())
    with pytest.raises(UsageError, match=f"track.trackers: {name} is not installed"):
        refuse_trackers(TrackSection(trackers=("tensorboard", name)))


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def tensorboard(folder, values, *, history=(), concludes=False):
    warned = []
    tracking = Tracking(["tensorboard"], on_failure=warned.append)
    tracking.begin(tracked_run(folder, history=history))
    for step, loss in values:
        tracking.log({"train/loss": loss}, step=step)
    if concludes:
        tracking.conclude(conclusion(folder))
    tracking.end("finished" if concludes else "failed", seconds=LONG)
    assert warned == []


def events_of(*attempts):
    """What TensorBoard shows of the attempts' files in one folder."""
    together = attempts[0].parent / "together"
    together.mkdir()
    for attempt in attempts:
        for path in attempt.rglob("events.out.*"):
            shutil.copy(path, together / f"{attempt.name}.{path.name}")
    events = EventAccumulator(str(together))
    events.Reload()
    return events


@pytest.mark.parametrize("kept", [("a01", "a02"), ("a02",)])
def test_a_second_attempt_goes_on_with_the_same_tensorboard_run_and_makes_its_steps_again(tmp_path, kept):
    """The files of the first may be lost with its machine."""
    tensorboard(tmp_path / "a01", [(1, 3.0), (2, 2.5), (3, 9.0)])
    history = [(1, {"train/loss": 3.0}), (2, {"train/loss": 2.5})]
    tensorboard(tmp_path / "a02", [(3, 2.25), (4, 2.0)], history=history, concludes=True)
    events = events_of(*[tmp_path / name for name in kept])

    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(1, 3.0), (2, 2.5), (3, 2.25), (4, 2.0)]
    assert {tag: events.Scalars(tag)[0].value for tag in FIGURES} == FIGURES
    texts = {tag: events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0] for tag in ("verdict", "page")}
    assert texts == {"verdict": b"`It learned.`", "page": b"`s3://models/runs/r1/report.html`"}
    assert b"| lora.r | `8` |" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path):
    (tmp_path / "file").write_text("a file where a folder is wanted")
    warned = []
    tracking = Tracking(["tensorboard"], on_failure=warned.append)
    tracking.begin(tracked_run(tmp_path / "file" / "below"))
    tracking.end("failed", seconds=LONG)

    assert len(warned) == 1
    assert warned[0].startswith("tracking by tensorboard stopped: ")


# --- MLflow and W&B: what they are asked for, by stand-ins for their libraries; tests/trackers has the real ones ----


class Server:
    """What an MLflow server holds."""

    def __init__(self):
        self.runs, self.asked = {}, 0


class Client:
    """What asks it."""

    def __init__(self, server):
        self.server = server

    def get_metric_history(self, run, name):
        return [types.SimpleNamespace(step=step) for key, _, _, step in self.server.runs[run]["metrics"] if key == name]

    def get_experiment_by_name(self, name):
        return types.SimpleNamespace(experiment_id=name) if self.server.runs else None

    def create_experiment(self, name):
        return name

    def search_runs(self, experiments, wanted, max_results):
        key = wanted.split("'")[1]
        found = [i for i, run in self.server.runs.items() if run["tags"]["qlora_job.key"] == key]
        return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=i)) for i in found[:max_results]]

    def create_run(self, experiment, run_name, tags):
        number = f"id{len(self.server.runs)}"
        self.server.runs[number] = {"name": run_name, "tags": dict(tags), "params": {}, "metrics": [], "files": []}
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=number))

    def log_batch(self, run, metrics=(), params=()):
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.server.asked += 1
        self.server.runs[run]["metrics"] += metrics
        self.server.runs[run]["params"] |= dict(params)

    def update_run(self, run, status):
        self.server.runs[run]["status"] = status

    def set_tag(self, run, name, value):
        self.server.runs[run]["tags"][name] = value

    def log_artifact(self, run, path):
        self.server.runs[run]["files"].append(Path(path).read_text())

    def set_terminated(self, run, status):
        self.server.runs[run]["status"] = status


def mlflow_stand_in(server, *, has_server=True):
    entities = types.SimpleNamespace(
        Metric=lambda key, value, timestamp, step: (key, value, timestamp, step),
        Param=lambda name, value: (name, value),
    )
    library = types.SimpleNamespace(
        MlflowClient=lambda: Client(server), entities=entities, is_tracking_uri_set=lambda: has_server
    )
    return {"mlflow": library, "mlflow.entities": entities}


@contextmanager
def stands_in(monkeypatch, modules):
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


def test_mlflow_has_one_run_of_all_attempts_with_losses_verdict_and_page(tmp_path, monkeypatch):
    server = Server()
    with stands_in(monkeypatch, mlflow_stand_in(server)):
        warned = []
        tracking = Tracking(["mlflow"], on_failure=warned.append)
        tracking.begin(tracked_run(tmp_path))
        tracking.log({"train/loss": 3.0}, step=1)
        tracking.end("stopped", seconds=LONG)
        assert [run["status"] for run in server.runs.values()] == ["KILLED"]
        warned += follow(["mlflow"], tmp_path)

    assert warned == []
    [run] = server.runs.values()
    assert (run["name"], run["status"], run["files"]) == ("r1", "FINISHED", ["<!DOCTYPE html><p>the page</p>"])
    assert run["params"] == {"model.base": "tiny/base", "lora.r": "8"}
    assert run["tags"]["verdict"] == run["tags"]["mlflow.note.content"] == "It learned."
    logged = defaultdict(list)
    for name, value, _, step in run["metrics"]:
        logged[name].append((step, value))
    assert logged["train/loss"] == [(1, 3.0), (1, 3.0), (2, 2.0), (3, 1.0)]
    assert {name: logged[name] for name in FIGURES} == {name: [(3, value)] for name, value in FIGURES.items()}


def test_thousands_of_steps_are_few_requests_to_mlflow(tmp_path, monkeypatch):
    server = Server()
    with stands_in(monkeypatch, mlflow_stand_in(server)):
        assert follow(["mlflow"], tmp_path, steps=5000) == []

    assert sum(name == "train/loss" for name, *_ in server.runs["id0"]["metrics"]) == 5000
    assert server.asked < 5000


def test_mlflow_without_a_server_is_said(tmp_path, monkeypatch):
    with stands_in(monkeypatch, mlflow_stand_in(Server(), has_server=False)):
        [warned] = follow(["mlflow"], tmp_path)

    assert "MLFLOW_TRACKING_URI is not set" in warned


def test_wandb_is_asked_for_one_run_and_to_look_at_nothing_else(tmp_path, monkeypatch):
    begun, logged, ends = [], [], []

    def finish(*, exit_code):
        ends.append(exit_code)

    run = types.SimpleNamespace(
        step=0,
        log=lambda numbers, step: logged.append((step, numbers)),
        summary={},
        finish=finish,
    )
    settings = type("Settings", (dict,), {"model_fields": {"silent": 0, "console": 0, "x_disable_meta": 0}})
    stand_in = types.SimpleNamespace(
        Settings=settings,
        init=lambda **asked: begun.append(asked) or run,
        Html=lambda path, inject: Path(path).read_text(),
    )
    with stands_in(monkeypatch, {"wandb": stand_in}):
        assert follow(["wandb"], tmp_path) == []

    [asked] = begun
    assert asked.pop("settings") == {"silent": True, "console": "off", "x_disable_meta": True}
    assert asked == {
        "project": "notes",
        "id": "r1-0a0b0c0d",
        "name": "r1",
        "resume": "allow",
        "dir": str(tmp_path),
        "config": {"model.base": "tiny/base", "lora.r": 8, "run_uri": "s3://models/runs/r1"},
    }
    losses = [(step, {"train/loss": 4.0 - step}) for step in (1, 2, 3)]
    assert logged == [*losses, (3, {**FIGURES, "report": "<!DOCTYPE html><p>the page</p>"})]
    assert run.summary == {"verdict": "It learned."}
    assert ends == [0]


# --- the device ------------------------------------------------------------------------------------------------------


def test_a_gpu_that_is_asked_for_and_not_visible_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SickDeviceError, match="no GPU is visible"):
        choose_device("cuda")
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_the_cpu_says_what_it_is():
    cpu = torch.device("cpu")
    assert device_name(cpu).startswith("CPU, ")
    assert device_memory(cpu).kind == "cpu"
    assert peak_memory_bytes(cpu) > 50 * 2**20
