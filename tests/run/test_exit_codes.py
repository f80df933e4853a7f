"""Every exit code of the table from a real process, and what the store's memory of earlier attempts makes of some."""

import contextlib
import json
import signal
import socket
import threading
import time

import pytest
from job_process import Job

from job.core.errors import ENDINGS, ending
from job.edge.host.crashing import disarm
from job.edge.run.lock import Lock
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store

NO_MEMORY = """
import accelerate
import torch


def backward(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")


accelerate.Accelerator.backward = backward
"""
"""A GPU whose memory never suffices. There is none here: what is shown is all that the job does about it."""


def done(job):
    job.recipe["train"]["steps"] = 1
    return job.start("run")


def unknown_key(job):
    job.recipe["train"]["learningrate"] = 1
    return job.start("run", cold=True)


def no_json(job):
    with (job.data / "train.jsonl").open("a") as file:
        file.write("oops\n")
    return job.start("run")


def no_data(job):
    (job.data / "train.jsonl").unlink()
    return job.start("run")


def a_bug(job):
    return job.start("run", "--crash-at", "step.middle=error")


def no_folder(job):
    (job.folder / "file").write_text("")
    job.workdir = job.folder / "file" / "work"
    return job.start("run")


def asked_to_stop(job):
    job.recipe["train"]["steps"] = 30
    with job.begun("run") as running:
        running.until(lambda event: event["event"] == "step")
        running.child.send_signal(signal.SIGTERM)
        return running.end()


def not_allowed(job):
    with answering(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n") as endpoint:
        return job.start("run", "--output", "s3://bucket/prefix", **s3(endpoint))


def another_recipe(job):
    job.call("run", "--run-id", "mine", stop_in="load_model|resume|ask_base")
    return job.start("run", "--run-id", "mine", "--set", "lora.r=2")


def not_finite(job):
    job.recipe["train"] |= {"learning_rate": 1e30, "optimizer": "sgd", "max_grad_norm": 1e9}
    return job.start("run")


def no_memory(job):
    (job.folder / "planted").mkdir()
    (job.folder / "planted" / "sitecustomize.py").write_text(NO_MEMORY)
    return job.start("run", PYTHONPATH=str(job.folder / "planted"))


def no_gpu(job):
    return job.start("run", "--device", "cuda", CUDA_VISIBLE_DEVICES="")


def silent_server(job):
    with answering(None) as endpoint:
        return job.start("run", "--output", "s3://bucket/prefix", "--stall-seconds", "3", **s3(endpoint))


# --- two that wait ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_server(job):
    """Its store is away: it is patient for half a minute."""
    with socket.socket() as closed:  # bound and not listening: nobody else gets the port, and nobody answers
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with job.begun("run", "--output", "s3://bucket/prefix", **s3(endpoint)) as running:
            yield running


@contextlib.contextmanager
def held_by_another(job):
    store = open_store(f"file://{job.store}", StoreSettings())
    owner = {"host": "another-node", "pid": 1}
    # Its lease is long and it is renewed all the time: only that it changes counts.
    lock = Lock(store, "runs/mine/lock.json", lease_seconds=60, owner=owner, conditional=True)
    lock.acquire(above=0, should_stop=lambda: False)
    over = threading.Event()

    def renew():
        while not over.wait(0.5):
            lock._renew_once()

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with job.begun("run", "--run-id", "mine") as running:
            yield running
    finally:
        over.set()
        thread.join()
        lock.release()


WAITING = {84: held_by_another, 69: no_server}


@pytest.fixture(scope="module", autouse=True)
def waiting(tmp_path_factory, base, warm):
    """Code -> job and process: begun before the first test of this file, looked at by the last ones."""
    with contextlib.ExitStack() as stack:
        jobs = {code: Job(tmp_path_factory.mktemp("waiting"), base, warm) for code in WAITING}
        yield {code: (job, stack.enter_context(WAITING[code](job))) for code, job in jobs.items()}


PRODUCED = {
    0: done,
    64: unknown_key,
    65: no_json,
    66: no_data,
    70: a_bug,
    74: no_folder,
    75: asked_to_stop,
    77: not_allowed,
    78: another_recipe,
    80: not_finite,
    81: no_memory,
    82: no_gpu,
    83: silent_server,
}
"""Code -> what ends with it at once."""
NO_STORE = {69, 77, 83}
"""Codes that are produced here by a store that takes nothing."""
SAID = {69: "failed 8 times", 81: "lower data.max_length", 83: "nothing moved", 84: "process 1 on another-node"}


def s3(endpoint):
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "r-1"}


@contextlib.contextmanager
def answering(answer):
    """A server that says the same to everyone; None: it listens, and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.settimeout(0.1)
        over = threading.Event()

        def serve():
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    caller, _ = listener.accept()
                    with caller:
                        caller.settimeout(10)
                        caller.recv(1 << 16)
                        caller.sendall(answer)

        thread = threading.Thread(target=serve if answer is not None else over.wait)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


# --- what earlier attempts mean ---------------------------------------------------------------------------------------


def stopped(job, phase):
    ended = job.call("run", stop_in=phase)
    return ended.code


def ends(job):
    return [json.loads(path.read_text()) for path in sorted(job.only_run().glob("attempts/*-end.json"))]


def test_the_third_stop_in_a_row_without_a_new_step_ends_83(job):
    """Whatever stops it so early will do it again; the schedulers do not count a 75.

    The third is the real command, stopped among its imports: that is where its handlers must stand already.
    """
    assert [stopped(job, "download"), stopped(job, "encode")] == [75, 75]
    with job.begun("run", cold=True) as running:
        running.until(lambda event: event["event"] == "phase" and event["name"] == "load_libraries")
        running.child.send_signal(signal.SIGTERM)
        third = running.end()
    assert third.code == 83, third.stdout
    assert third.outcome["code"] == 83
    assert (third.events[-1]["event"], third.events[-1]["exit_code"]) == ("ended", 83)
    assert "the third stop in a row" in third.outcome["reason"]
    assert third.outcome["again"] == "yes, counted"
    assert [end["exit_code"] for end in ends(job)] == [75, 75, 83]
    assert job.call("run").code == 0


def test_too_little_time_each_time_is_a_stop_in_vain(job):
    """A deadline within the time that a stop may need: there is no use in beginning."""
    ended = [job.call("run", "--deadline", str(time.time() + 20), "--grace-seconds", "30") for _ in range(3)]
    assert [each.code for each in ended] == [75, 75, 83]
    assert all("too little to begin with" in each.outcome["reason"] for each in ended)
    assert all("fetch_base" not in each.phases() for each in ended)
    assert job.call("run").code == 0


def test_a_deadline_ends_training_with_75_and_all_of_it_committed(job):
    job.recipe["train"]["steps"] = 100_000
    ended = job.call("run", "--deadline", str(time.time() + 8), "--grace-seconds", "1")
    assert ended.code == 75, ended.stdout
    if told := ended.named("step"):  # a machine that is slow enough is stopped before
        assert ended.outcome["last_committed_step"] == told[-1]["step"]


def test_a_committed_step_makes_the_count_of_stops_begin_anew(job):
    assert [stopped(job, "download"), stopped(job, "encode")] == [75, 75]
    with job.begun("run") as running:
        running.until(lambda event: event["event"] == "step" and event["step"] == 1)
        running.child.send_signal(signal.SIGTERM)
        third = running.end()
    assert third.code == 75, third.stdout
    assert third.outcome["last_committed_step"] >= 1
    assert [stopped(job, "load_model|resume|ask_base|train"), stopped(job, "resume|train")] == [75, 75]


def failed(job, point):
    try:
        return job.call("run", "--crash-at", f"{point}=error")
    finally:
        disarm()


def test_the_same_failure_at_the_same_step_twice_is_final_until_it_is_forced(job):
    first, second = failed(job, "step.middle:3"), failed(job, "step.middle:1")  # the second resumes after step 2
    assert (first.code, first.outcome["again"]) == (70, "yes, counted")
    assert (second.code, second.outcome["again"]) == (70, "no")
    assert second.outcome["last_committed_step"] == 2

    third = job.start("run")
    assert third.code == 70, third.stdout
    assert third.outcome["again"] == "no"
    assert third.phases() == ["identify", "try_output", "lock"]
    assert "--force" in third.outcome["reason"]
    assert "crash point step.middle" in third.outcome["reason"]
    assert third.events[-1]["again"] == "no"
    assert len(ends(job)) == 2  # it was no attempt

    forced = job.call("run", "--force")
    assert forced.code == 0, forced.stdout
    assert [attempt["exit_code"] for attempt in job.report()["attempts"]] == [70, 70, 0]


def test_the_same_failure_at_another_step_is_tried_again(job):
    assert [failed(job, "step.middle:2").code, failed(job, "step.middle:5").code] == [70, 70]
    third = job.call("run")
    assert third.code == 0, third.stdout


# --- the table; last, as some wait meanwhile --------------------------------------------------------------------------


def test_every_code_of_the_table_is_produced_here():
    assert PRODUCED.keys() | WAITING.keys() == {row.code for row in ENDINGS}


@pytest.mark.parametrize("code", [*PRODUCED, *WAITING])
def test_the_process_ends_with_the_code_and_says_the_same_everywhere(job, waiting, code):
    """In its exit status, in the last line of its log, in its outcome file; with what to do."""
    if code in WAITING:
        job, running = waiting[code]
        ended = running.end()
    else:
        ended = PRODUCED[code](job)
    assert ended.code == code, ended.stdout + ended.stderr
    row = ending(code)
    assert ended.outcome["state"] == "ended"
    assert (ended.outcome["code"], ended.outcome["again"]) == (code, row.again.value)
    endings = [json.loads(path.read_text()) for path in sorted(job.store.glob(f"endings/*-{code}-*.json"))]
    assert [(each["code"], each["again"]) for each in endings] == [(code, row.again.value)] * (code not in NO_STORE)
    if not code:
        assert job.report()["attempts"][-1]["exit_code"] == 0
        return
    assert ended.outcome["action"] == row.action
    last = ended.events[-1]
    assert (last["event"], last["exit_code"], last["again"]) == ("ended", code, row.again.value)
    assert SAID.get(code, "") in last["reason"]
    assert last["reason"] == ended.outcome["reason"]
    assert not list(job.store.glob("runs/*/report.json"))
