"""The command that starts workers, and what their supervisor makes of their ends; the processes are stand-ins."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

from job.core.attempt.seat import Team
from job.core.errors import CannotFitError, PeerLostError, StopRequestedError, UnavailableError
from job.edge.host.outcome import Outcome
from job.launch import supervisor
from job.launch.launched import Launched
from job.launch.supervisor import launcher_command
from job.stages.attempt import Phases, Standing

WORKER = """
import json, os, signal, sys, time
rank, folder, deed = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.setsid()
open(f"{folder}/pid-r{rank:02d}", "w").write(str(os.getpid()))
def say(**facts):
    path = f"{folder}/outcome-r{rank:02d}.json"
    open(path + ".tmp", "w").write(json.dumps(facts)); os.replace(path + ".tmp", path)
def stop(*_):
    say(state="ended", code=75, again="yes, not counted", reason=f"stopped by rank {rank}", last_committed_step=4)
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN if deed == "deaf" else stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # the launcher is kept from it
say(state="running", phase="train", step=3, of=9, loss=1.5, run_uri="file:///r", last_committed_step=2)
if deed == "die": os.kill(os.getpid(), signal.SIGKILL)
if deed == "save":
    time.sleep(2)
    say(state="ended", code=70, again="yes", reason="the others are gone", last_committed_step=5)
    sys.exit(1)
if deed.isdigit():
    say(state="ended", code=int(deed), again="no", reason="it is too large", action="do this", attempt=3)
    sys.exit(1)
time.sleep(600)
"""
LAUNCHER = """
import subprocess, sys, time
workers = [subprocess.Popen([sys.executable, "-c", sys.argv[1], str(rank), sys.argv[2], deed])
           for rank, deed in enumerate(sys.argv[3:])]
while not workers:  # the other nodes have not come
    time.sleep(60)
sys.exit(max(abs(worker.wait()) for worker in workers))
"""


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """Supervise stand-ins that do what their deeds say; returns the attempt and what was raised."""

    def supervise(*deeds, grace=None, asked=lambda: False, others=0.5, nodes=1):
        monkeypatch.setattr(supervisor, "_OTHERS_SECONDS", others)
        monkeypatch.setattr(supervisor, "_FOLLOWERS_SECONDS", 0.2)
        folders = []

        def launched(_command, *, environment, folder):
            folders.append(folder)
            command = [sys.executable, "-c", LAUNCHER, WORKER, str(folder), *deeds]
            return Launched(command, environment=environment, folder=folder)

        monkeypatch.setattr(supervisor, "Launched", launched)
        outcome = Outcome(tmp_path / "outcome.json")
        attempt = SimpleNamespace(
            worker=SimpleNamespace(workdir=tmp_path, should_stop=asked),
            grace_seconds=grace,
            standing=Standing(),
            outcome=outcome,
            phases=Phases(outcome, began=time.monotonic()),
        )
        raised = None
        try:
            team = Team(gpus=len(deeds) or 1, nodes=nodes, rendezvous="node-0:29500" if nodes > 1 else None)
            supervisor.supervise(attempt, team, arguments=[], environment=dict(os.environ), reason=lambda: "SIGTERM")
        except Exception as error:  # noqa: BLE001 - looked at by the test
            raised = error
        assert not folders[0].exists()
        return attempt, raised

    return supervise


def test_the_launcher_is_torch_s_and_starts_nothing_twice():
    command = launcher_command(Team(gpus=4), ["run", "r.yaml", "--gpus", "4"])

    assert command[:4] == [sys.executable, "-P", "-m", "torch.distributed.run"]
    assert command[4:9] == ["--max-restarts", "0", "--standalone", "--nproc-per-node", "4"]
    assert Path(command[9]).name == "entrypoint.py"
    assert Path(command[9]).is_file()
    assert command[10:] == ["run", "r.yaml", "--gpus", "4"]


def test_nodes_meet_where_they_are_told():
    command = launcher_command(Team(gpus=8, nodes=2, node_rank=1, rendezvous="node-0:29500"), ["run", "r"])

    assert command[6:14] == [
        *("--nnodes", "2", "--node-rank", "1", "--master-addr", "node-0", "--master-port", "29500"),
    ]


def test_who_has_nothing_to_do_any_more_is_not_waited_for(supervised):
    """Rank 0 has ended, and the other one is frozen, say: the grace, which is long, is for saving."""
    _, raised = supervised("83", "deaf", grace=600.0)

    assert raised is not None
    assert raised.code == 83


def test_the_run_has_ended_well_when_rank_0_has(supervised):
    attempt, raised = supervised("0", "sleep")

    assert raised is None
    assert attempt.standing.run_uri is None  # the last word of rank 0 named none


def test_what_rank_0_says_of_the_run_the_supervisor_says(supervised, tmp_path):
    asked_after = time.monotonic() + 3.0
    attempt, raised = supervised("sleep", "sleep", grace=60.0, asked=lambda: time.monotonic() > asked_after)

    assert isinstance(raised, StopRequestedError)
    assert str(raised) == "stopped by rank 0"
    assert attempt.standing.last_committed_step == 4
    said = json.loads((tmp_path / "outcome.json").read_text())
    assert said["state"] == "running"  # the front door says the end


def test_the_first_cause_is_raised_with_its_rank_and_what_to_do(supervised):
    attempt, raised = supervised("sleep", "81")

    assert type(raised) is CannotFitError
    assert (str(raised), raised.action) == ("rank 1: it is too large", "do this")
    assert attempt.standing.final is True


@pytest.mark.parametrize("rank", [0, 1])
def test_one_without_a_word_was_killed(supervised, rank):
    deeds = ["sleep", "sleep"]
    deeds[rank] = "die"
    _, raised = supervised(*deeds)

    assert type(raised) is PeerLostError
    assert f"rank {rank} ended without a word: it was killed in phase train" in str(raised)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_left_by_one_that_was_killed_has_the_time_to_save(supervised, rank):
    """Also by rank 0: whoever holds the newest state may commit it."""
    deeds = ["save", "save"]
    deeds[rank] = "die"
    with structlog.testing.capture_logs() as said:
        supervised(*deeds, others=60.0)

    (workers,) = [event for event in said if event["event"] == "workers"]
    assert workers["ended"] == {str(rank): "no word", str(1 - rank): 70}


def test_who_does_not_end_within_the_grace_is_killed(supervised):
    _, raised = supervised("deaf", "sleep", grace=2.0, asked=lambda: True, others=60.0)

    assert isinstance(raised, StopRequestedError)  # rank 1's, which had the time


def test_a_launcher_that_is_killed_leaves_workers_that_still_can_save(tmp_path, supervised, monkeypatch):
    kill_at, done = time.monotonic() + 3.0, []

    def asked():
        if time.monotonic() > kill_at and not done:
            done.append(True)
            (child,) = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _is_ours(p)]
            os.kill(child, signal.SIGKILL)
        return False

    _, raised = supervised("sleep", "sleep", asked=asked, others=60.0)

    assert type(raised) is PeerLostError
    assert "the launcher of the workers was killed (exit code -9)" in str(raised)


def _is_ours(place):
    try:
        parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        return parent == os.getpid() and LAUNCHER.encode() in (place / "cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_launcher_never_sees_a_request_to_stop(tmp_path, number):
    """Some schedulers send it to every process of a job; torch's launcher would kill its workers, or leave them."""
    ready = "print('ready', flush=True); import time; time.sleep(600)"
    launched = Launched([sys.executable, "-c", ready], environment=dict(os.environ), folder=tmp_path)
    try:
        os.kill(launched._child.pid, number)
        assert number in _pending(launched._child.pid)
        assert launched.runs
    finally:
        launched.kill()


def _pending(process):
    """Signals that it was sent and does not see."""
    status = Path(f"/proc/{process}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("ShdPnd:")).split()[1], 16)
    return {number for number in range(1, 65) if mask & (1 << (number - 1))}


def test_a_node_that_is_asked_to_stop_before_all_have_met_ends_at_once(supervised):
    """There is nothing to save, and whoever waits for the end of the grace waits for it in vain."""
    _, raised = supervised(grace=600.0, asked=lambda: True, nodes=2, others=60.0)

    assert type(raised) is StopRequestedError
    assert "before the nodes had come together at node-0:29500" in str(raised)


def test_nodes_that_do_not_meet_are_an_outage(supervised, monkeypatch):
    """No worker has come, and the launcher has given up."""
    launched = SimpleNamespace(code=1, runs=False, works=False, look=lambda: None, has_ended=lambda _rank: False)
    team = Team(gpus=1, nodes=2, rendezvous="node-0:29500")
    worker = SimpleNamespace(should_stop=lambda: False)
    attempt = SimpleNamespace(grace_seconds=None, standing=Standing(), worker=worker)
    watch = supervisor._Watch(attempt, team, launched, Path("/nowhere"), lambda: None)

    with pytest.raises(UnavailableError, match="node-0:29500"):
        watch.conclude()
