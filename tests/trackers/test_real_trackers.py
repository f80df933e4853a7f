"""MLflow against its own server, W&B by its own client: runs that are broken off, servers that are away.

`make test-trackers` brings both packages; where one is missing its tests are skipped.
"""

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from servers import free_port
from wandb_files import config, history, summary
from wandb_stand_in import wandb_stand_in

pytestmark = pytest.mark.trackers
_START_SECONDS = 300
FIGURES = ("final/validation_loss", "final/validation_loss_base", "final/exact_match", "final/chosen_step")


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed; make test-trackers brings it"
    )


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    """MLflow's own server, as `mlflow server` starts it."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "files")]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        until = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.5)
        else:
            raise RuntimeError((folder / "server.log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def deaf_server():
    """Takes every connection, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        kept, over = [], threading.Event()
        listening.settimeout(0.1)

        def take():
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    kept.append(listening.accept())

        thread = threading.Thread(target=take)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        over.set()
        thread.join()
        for connection, _ in kept:
            connection.close()


def broken_off_and_gone_on_with(job, tracker, *, how, **environment):
    """Two attempts at a run of six steps: the first is broken off in the sixth, after the fourth was committed."""
    job.recipe["track"] = {"trackers": [tracker], "project": "notes"}
    assert job.start("run", "--crash-at", f"step.middle:6={how}", **environment).code == {"kill": -9, "error": 70}[how]
    ended = job.start("run", **environment)
    assert ended.code == 0, ended.stdout
    assert ended.named("tracking_stopped") == []
    assert all(line.startswith("{") for line in ended.stdout.splitlines())  # a tracker's own words are no events
    return job.report(), ended


@needs("mlflow")
def test_mlflow_s_server_has_one_run_with_losses_verdict_and_page(job, mlflow_server):
    report, _ = broken_off_and_gone_on_with(job, "mlflow", how="kill", MLFLOW_TRACKING_URI=mlflow_server)
    import mlflow

    client = mlflow.MlflowClient(mlflow_server)
    [run] = client.search_runs([client.get_experiment_by_name("notes").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", report["run_id"])
    assert run.data.params["lora.r"] == "4"
    assert run.data.params["model.base"] == report["model"]["base"]
    losses = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "train/loss")}
    assert losses == pytest.approx(dict(enumerate(report["curve"]["loss"], start=1)), rel=1e-6)
    rates = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "train/learning_rate")}
    assert rates == pytest.approx(dict(enumerate(report["curve"]["learning_rate"], start=1)), rel=1e-6)
    judged = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "validation/loss")}
    assert judged == pytest.approx({each["step"]: each["loss"] for each in report["evaluations"]}, rel=1e-6)
    assert run.data.metrics["final/validation_loss"] == pytest.approx(report["sweet_spot"]["loss"])
    assert set(FIGURES) <= set(run.data.metrics)
    assert run.data.tags["verdict"] == run.data.tags["mlflow.note.content"]
    assert f"Step {report['sweet_spot']['step']} of 6 is kept" in run.data.tags["verdict"]
    page = Path(client.download_artifacts(run.info.run_id, "report.html", str(job.folder)))
    assert page.read_bytes() == (job.only_run() / "report.html").read_bytes()


@needs("wandb")
def test_w_and_b_offline_has_one_run_with_losses_verdict_and_page(job):
    report, _ = broken_off_and_gone_on_with(job, "wandb", how="error", WANDB_MODE="offline")
    kept = sorted((job.only_run() / "wandb").glob("a*/offline-run-*/run-*.wandb"))

    assert [path.relative_to(job.only_run() / "wandb").parts[0] for path in kept] == ["a01", "a02"]
    [name] = {path.name for path in kept}  # one id: `wandb sync` makes one run of both
    assert re.fullmatch(rf"run-{re.escape(report['run_id'])}-[0-9a-f]{{8}}\.wandb", name)
    first, second = (history(path) for path in kept)
    assert [row["_step"] for row in first] == [*range(5)]
    losses = {row["_step"]: row["train/loss"] for row in second if "train/loss" in row}  # the last one has them all
    assert losses == pytest.approx(dict(enumerate(report["curve"]["loss"], start=1)), rel=1e-6)
    judged = {row["_step"]: row["validation/loss"] for row in second if "validation/loss" in row}
    assert judged == pytest.approx({each["step"]: each["loss"] for each in report["evaluations"]}, rel=1e-6)
    assert config(kept[0])["lora.r"] == 4
    found = summary(kept[1])
    assert found["final/validation_loss"] == pytest.approx(report["sweet_spot"]["loss"])
    assert set(FIGURES) <= set(found)
    assert f"Step {report['sweet_spot']['step']} of 6 is kept" in found["verdict"]
    [page] = kept[1].parent.rglob("report_*.html")
    assert page.read_bytes() == (job.only_run() / "report.html").read_bytes()
    assert not [*kept[0].parent.rglob("wandb-metadata.json")]  # it would hold the command line


@pytest.fixture
def wandb_server():
    with wandb_stand_in() as running:
        yield running


def online(server):
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}


@needs("wandb")
def test_w_and_b_s_client_goes_on_with_one_run_at_its_server(job, wandb_server):
    report, ended = broken_off_and_gone_on_with(job, "wandb", how="error", **online(wandb_server))
    [run] = wandb_server.runs.values()

    assert run.name == report["run_id"]
    assert run.begun == 2
    assert [code != 0 for code in run.exit_codes] == [True, False]  # the first attempt failed
    assert [line["_step"] for line in run.lines] == [*range(7)]
    losses = {line["_step"]: line["train/loss"] for line in run.lines if "train/loss" in line}
    assert losses == pytest.approx(dict(enumerate(report["curve"]["loss"], start=1)), rel=1e-6)
    assert f"Step {report['sweet_spot']['step']} of 6 is kept" in run.summary["verdict"]
    [page] = [content for name, content in run.files.items() if name.endswith(".html")]
    assert page == (job.only_run() / "report.html").read_bytes()
    assert set(run.files) & {"requirements.txt", "wandb-metadata.json", "output.log"} == set()
    assert "0" * 40 not in ended.stdout + ended.stderr
    assert not (job.only_run() / "wandb").exists()  # it has sent all


@needs("wandb")
def test_a_server_that_falls_silent_in_the_middle_costs_a_warning_and_the_process_ends(job, wandb_server):
    wandb_server.goes_deaf_with_history = True
    job.recipe["track"] = {"trackers": ["wandb"]}
    ended = job.start("run", **online(wandb_server))

    assert ended.code == 0
    assert wandb_server.is_deaf
    [warned] = ended.named("tracking_stopped")
    assert warned["reason"].startswith("tracking by wandb stopped: ")
    assert warned["reason"] in job.report()["notes"]


@pytest.mark.parametrize(
    ("tracker", "names"),
    [
        pytest.param("mlflow", ("MLFLOW_TRACKING_URI",), marks=needs("mlflow")),
        pytest.param("wandb", ("WANDB_BASE_URL",), marks=needs("wandb")),
    ],
)
@pytest.mark.parametrize("how", ["refuses", "never answers"])
def test_a_server_that_is_away_costs_a_warning_and_the_process_ends(job, tracker, names, how):
    job.recipe["track"] = {"trackers": [tracker]}
    with deaf_server() if how == "never answers" else contextlib.nullcontext(f"http://127.0.0.1:{free_port()}") as url:
        ended = job.start("run", WANDB_API_KEY="0" * 40, WANDB_MODE="online", **dict.fromkeys(names, url))

    assert ended.code == 0
    [warned] = ended.named("tracking_stopped")
    assert f"tracking by {tracker} stopped: " in warned["reason"]
    assert warned["reason"] in job.report()["notes"]
    assert ended.named("finished")
