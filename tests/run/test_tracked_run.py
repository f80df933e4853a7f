"""A run that is followed: its event files in the store are one run over all attempts, whatever became of each."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from job.tune.loop.trackers import TRACKERS


def shown(run):
    """What TensorBoard shows of a run in the store: it is one, as all files lie in one folder."""
    folder = run / "tensorboard"
    assert all(path.is_file() for path in folder.iterdir())
    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return events


def text(events, tag):
    return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("how", ["kill", "error"])
def test_a_run_that_was_broken_off_is_one_run_to_tensorboard(job, how):
    job.recipe["track"] = {"trackers": ["tensorboard"], "project": "notes"}
    broken = job.start("run", "--crash-at", f"step.middle:6={how}")
    assert broken.code == (-9 if how == "kill" else 70)
    assert job.start("run").code == 0
    report, events = job.report(), shown(job.only_run())

    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in losses] == [*range(1, 7)]
    assert [value for _, value in losses] == pytest.approx(report["curve"]["loss"], rel=1e-6)
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    assert rates == pytest.approx(report["curve"]["learning_rate"], rel=1e-6)
    judged = [(event.step, event.value) for event in events.Scalars("validation/loss")]
    assert [step for step, _ in judged] == [each["step"] for each in report["evaluations"]]
    assert [loss for _, loss in judged] == pytest.approx([each["loss"] for each in report["evaluations"]], rel=1e-6)
    assert events.Scalars("final/exact_match")[0].value == pytest.approx(report["exact_match"]["tuned"])
    assert "step" in text(events, "verdict").lower()
    assert text(events, "page") == f"`{report['run_uri']}/report.html`"
    names = sorted(path.name.split(".")[0] for path in (job.only_run() / "tensorboard").iterdir())
    assert names == ["a01", "a02"]
    assert not (job.workdir / "trackers").exists() or not [*(job.workdir / "trackers").iterdir()]


def test_a_tracker_that_fails_costs_a_note_and_its_page_is_the_report_s(job, monkeypatch):
    class Away(TRACKERS["tensorboard"]):
        def conclude(self, conclusion):
            raise ConnectionError("the server is away")

    monkeypatch.setitem(TRACKERS, "tensorboard", Away)
    job.recipe["track"] = {"trackers": ["tensorboard"]}
    job.recipe["train"]["steps"] = 2
    ended = job.call("run")

    assert ended.code == 0
    [warned] = ended.named("tracking_stopped")
    assert warned["reason"] == "tracking by tensorboard stopped: ConnectionError: the server is away"
    assert warned["reason"] in job.report()["notes"]
    assert warned["reason"] in (job.only_run() / "report.html").read_text()


def test_what_w_and_b_kept_offline_is_brought_to_the_store_and_what_it_sent_is_not(job, monkeypatch):
    class Offline(TRACKERS["tensorboard"]):
        def open(self, run):
            super().open(run)
            for name in ("offline-run-1-a/run-a.wandb", "offline-run-1-a/logs/debug.log", "run-2-b/run-b.wandb"):
                path = run.folder / "wandb" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(name)

    monkeypatch.setitem(TRACKERS, "tensorboard", Offline)
    job.recipe["track"] = {"trackers": ["tensorboard"]}
    job.recipe["train"]["steps"] = 2
    assert job.call("run").code == 0

    kept = job.only_run() / "wandb"
    assert [path.relative_to(kept).as_posix() for path in kept.rglob("*.*")] == ["a01/offline-run-1-a/run-a.wandb"]
    assert not (job.workdir / "trackers" / job.only_run().name).exists()
