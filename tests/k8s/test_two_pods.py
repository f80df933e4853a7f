"""Two pods of k8s/overlays/multi-node as two processes: each has the variables that the manifest gives it, no others.

The node's name is localhost in place of what DNS says of pod 0, paths are a folder's, and the device is the CPU.
"""

import re
import signal
import socket
import sys
from pathlib import Path

import pytest
from job_process import Job
from job_process import process as started
from k8s_container import image_environment
from k8s_manifests import ROOT, overlay
from k8s_parts import jobs, trainer
from run_material import long_recipe, make_base

sys.path.append(str(Path(__file__).parents[1] / "launch"))

from many_processes import strike

NAME = "notes-29"
"""Of the Job: whatever it is called, pods find each other."""


def field(path, index):
    """What the downward API says of a pod."""
    (name,) = re.findall(r"\['(.*)'\]", path)
    return {"batch.kubernetes.io/job-name": NAME, "batch.kubernetes.io/job-completion-index": str(index)}[name]


def variables(index):
    """Of one pod's container, as Kubernetes makes them: in order, each `$(NAME)` replaced by what is known so far."""
    (job,) = jobs(overlay("multi-node"))
    found = image_environment() | {"JOB_COMPLETION_INDEX": str(index)}  # each container of an Indexed Job has it
    for each in trainer(job["spec"]["template"]["spec"])["env"]:
        if "fieldRef" in each.get("valueFrom", {}):
            found[each["name"]] = field(each["valueFrom"]["fieldRef"]["fieldPath"], index)
        elif "value" in each:
            found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda used: found[used[1]], each["value"])
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def job(tmp_path, base):
    made = long_recipe(Job(tmp_path, base))
    made.recipe["lora"]["dropout"] = 0.0
    return made


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Pods:
    """The pods of one Job, one attempt after the other."""

    def __init__(self, job, port):
        self._job, self._port = job, port

    def begin(self, index):
        """A new pod: an empty work folder, an empty message."""
        place = self._job.folder / f"pod-{index}-{len(list(self._job.folder.glob('pod-*')))}"
        (place / "work").mkdir(parents=True)
        message = place / "termination-log"
        given = {name: re.sub("^/work(?=/|$)", str(place / "work"), text) for name, text in variables(index).items()}
        assert given["JOB_WORKDIR"] == given["HOME"] == given["TMPDIR"] == str(place / "work")
        assert given["JOB_RENDEZVOUS"] == f"{NAME}-0.qlora-job:29500"
        here = {"JOB_RENDEZVOUS": f"localhost:{self._port}", "JOB_DEVICE": "cpu", "JOB_GPUS": "1"}
        here |= {"JOB_OUTCOME_FILE": str(message), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "entrypoint.py"), "run", str(self._job.write())]
        return started(command, cwd=place, environment=given | here), message


@pytest.fixture
def pods(job, port):
    return Pods(job, port)


def end(running, message):
    running.outcome_file = message
    return running.end()


def test_two_pods_meet_at_the_first_one_and_carry_the_run_and_go_on_after_one_was_deleted(pods, job):
    (first, said_by_first), (second, said_by_second) = pods.begin(0), pods.begin(1)
    with second as other, first as running:
        running.until(lambda event: event["event"] == "step" and event["step"] >= 5)
        other.child.send_signal(signal.SIGTERM)  # kubectl delete pod
        stopped, also = end(running, said_by_first), end(other, said_by_second)
    assert (stopped.code, also.code) == (75, 75), stopped.stdout + also.stdout
    assert stopped.outcome["last_committed_step"] >= 5
    assert (stopped.outcome["again"], also.outcome["again"]) == ("yes, not counted", "yes, not counted")
    (joined,) = stopped.named("joined")
    assert (joined["ranks"], joined["nodes"]) == (2, 2)
    assert also.named("step") == []  # pod 0 has the log
    assert len(list((job.store / "endings").glob("*.json"))) == 1  # the run's, not each pod's

    (first, said_by_first), (second, said_by_second) = pods.begin(0), pods.begin(1)
    with second as other, first as running:
        done, also = end(running, said_by_first), end(other, said_by_second)
    assert (done.code, also.code) == (0, 0), done.stdout + also.stdout
    assert done.named("resumed")[0]["step"] == stopped.outcome["last_committed_step"]
    report = job.report()
    assert (report["throughput"]["ranks"], report["throughput"]["nodes"]) == (2, 2)
    assert report["resume_exact"] is True
    assert [attempt["exit_code"] for attempt in report["attempts"]] == [75, 0]


@pytest.mark.ranks
def test_what_one_pod_fails_with_both_end_with(pods, job):
    """Whichever of them the Job looks at first, it does what the table says."""
    job.recipe["train"]["learning_rate"] = 1e30
    (first, said_by_first), (second, said_by_second) = pods.begin(0), pods.begin(1)
    with second as other, first as running:
        ends = end(running, said_by_first), end(other, said_by_second)

    assert [each.code for each in ends] == [80, 80], [each.stdout for each in ends]
    assert {each.outcome["again"] for each in ends} == {"no"}


def test_a_pod_that_waits_for_the_other_one_ends_at_once_when_it_is_asked_to(pods):
    first, message = pods.begin(0)
    with first as running:
        running.until(lambda event: event["event"] == "supervisor")
        running.child.send_signal(signal.SIGTERM)
        ended = end(running, message)

    assert ended.code == 75, ended.stdout
    assert "before the nodes had come together" in ended.outcome["reason"]


@pytest.mark.ranks
def test_a_pod_that_comes_back_while_the_first_one_still_ends_does_not_join_it(pods):
    """Pod 0 is frozen in the midst of it here; the other was killed, and a new one is there before pod 0 has ended."""
    (first, said_by_first), (second, _) = pods.begin(0), pods.begin(1)
    with first as running:
        with second as other:
            running.until(lambda event: event["event"] == "checkpoint" and event["step"] >= 4)
            strike(running.child.pid, 0, signal.SIGSTOP)
            other.child.send_signal(signal.SIGKILL)
            other.child.wait()
        again, message = pods.begin(1)
        with again as early:
            too_early = end(early, message)
        strike(running.child.pid, 0, signal.SIGCONT)
        lost = end(running, said_by_first)

    assert too_early.code == 75, too_early.stdout
    assert "still ends the attempt before" in too_early.outcome["reason"]
    # A socket that is closed while its owner is frozen is now and then not noticed: then silence ends the wait.
    assert lost.code in {70, 83}, lost.stdout
    assert lost.outcome["again"] == "yes, counted"
    assert lost.outcome["last_committed_step"] >= 4
