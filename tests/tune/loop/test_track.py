"""Trackers and device: one tracked run over all attempts; what is missing is named."""

import importlib.util

import pytest
import torch
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.core.errors import SickDeviceError, UsageError
from job.core.recipe import TrackSection
from job.tune.device.device import choose_device, device_memory, device_name, peak_memory_bytes
from job.tune.loop.track import Tracking, make_accelerator, refuse_trackers

TENSORBOARD = TrackSection(trackers=("tensorboard",), project="notes")


def tracked(folder, values):
    """One attempt."""
    accelerator = make_accelerator(TENSORBOARD, on_cpu=True, folder=folder)
    tracking = Tracking(accelerator, TENSORBOARD, on_failure=pytest.fail)
    tracking.begin(run_id="r1", folder=folder, facts={"base": "tiny/base", "lora_r": 8})
    for step, loss in values:
        tracking.log({"train/loss": loss}, step=step)
    tracking.end()


def losses(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 3)) for event in events.Scalars("train/loss")]


def test_a_second_attempt_continues_the_same_tensorboard_run(tmp_path):
    tracked(tmp_path, [(1, 3.0), (2, 2.5)])
    assert losses(tmp_path / "notes") == [(1, 3.0), (2, 2.5)]
    tracked(tmp_path, [(3, 2.25)])
    assert losses(tmp_path / "notes") == [(1, 3.0), (2, 2.5), (3, 2.25)]


def test_a_tracker_that_is_not_installed_is_named():
    absent = next((name for name in ("wandb", "mlflow") if importlib.util.find_spec(name) is None), None)
    if absent is None:
        pytest.skip("every tracker's package is installed here")
    with pytest.raises(UsageError, match=f"track.trackers: {absent} is not installed"):
        refuse_trackers(TrackSection(trackers=("tensorboard", absent)))


def test_a_tracker_that_fails_is_reported_once_and_costs_no_training(tmp_path):
    accelerator = make_accelerator(TENSORBOARD, on_cpu=True, folder=tmp_path / "file" / "below")
    (tmp_path / "file").write_text("a file where a folder is wanted")
    told = []
    tracking = Tracking(accelerator, TENSORBOARD, on_failure=told.append)
    tracking.begin(run_id="r1", folder=tmp_path / "file" / "below", facts={})
    tracking.log({"train/loss": 1.0}, step=1)
    tracking.end()
    assert len(told) == 1
    assert told[0].startswith("tracking stopped: ")


def test_the_processes_that_train_together_stay_a_group(tmp_path, monkeypatch):
    """They still need each other once the trackers have ended: for the proof, and to hear that all is done."""
    ended = []
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda *_, **__: ended.append("the group"))
    tracked(tmp_path, [(1, 3.0)])

    assert losses(tmp_path / "notes") == [(1, 3.0)]
    assert ended == []


def test_without_trackers_nothing_is_written(tmp_path):
    accelerator = make_accelerator(TrackSection(), on_cpu=True, folder=tmp_path / "trackers")
    tracking = Tracking(accelerator, TrackSection(), on_failure=pytest.fail)
    tracking.begin(run_id="r1", folder=tmp_path / "trackers", facts={})
    tracking.log({"train/loss": 1.0}, step=1)
    tracking.end()
    assert list(tmp_path.iterdir()) == []


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
