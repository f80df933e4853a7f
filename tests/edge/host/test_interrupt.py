"""Signals set a flag and nothing else; tried on real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from job.edge.host.interrupt import _STOP_SIGNALS, Interrupt, kept_from_children

ROOT = Path(__file__).parents[3]
WORK = """
import sys, time
from job.edge.host.interrupt import Interrupt
interrupt = Interrupt()
interrupt.install()
print("ready", interrupt(), interrupt.reason, "torch" in sys.modules, flush=True)
while not interrupt():
    time.sleep(0.01)
print("saving", flush=True)
sys.stdin.readline()
print("saved", interrupt.reason, flush=True)
interrupt.ignore()
print("ending", flush=True)
sys.stdin.readline()
sys.exit(75)
"""


def _as_from_a_shell():
    """The tests themselves may have been started by nohup, which a child inherits."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def worker():
    child = subprocess.Popen(
        [sys.executable, "-c", WORK],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_as_from_a_shell,  # noqa: PLW1509 - it does nothing else
    )
    yield child
    child.kill()
    child.communicate()


@pytest.mark.parametrize("number", _STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_asks_to_stop_and_a_second_one_breaks_nothing(worker, number):
    assert worker.stdout.readline() == "ready False None False\n"
    worker.send_signal(number)
    assert worker.stdout.readline() == "saving\n"
    worker.send_signal(number)  # in the middle of a read: it goes on
    worker.stdin.write("\n")
    worker.stdin.flush()
    assert worker.stdout.readline() == f"saved {number.name}\n"
    assert worker.stdout.readline() == "ending\n"
    worker.send_signal(number)  # the exit code is decided
    worker.communicate("\n", timeout=60)
    assert worker.returncode == 75


def test_what_nohup_started_outlives_its_terminal():
    child = subprocess.Popen(
        ["/bin/sh", "-c", "trap '' HUP; exec \"$@\"", "sh", sys.executable, "-c", WORK],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready False None False\n"
    child.send_signal(signal.SIGHUP)
    child.send_signal(signal.SIGTERM)
    assert child.stdout.readline() == "saving\n"
    assert child.communicate("\n\n", timeout=60)[0] == "saved SIGTERM\nending\n"
    assert child.returncode == 75


def test_who_is_begun_by_one_that_is_kept_from_requests_to_stop_hears_them_all_the_same():
    """A launcher does not, its workers do."""
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with kept_from_children():
        child = subprocess.Popen(
            [sys.executable, "-c", launcher, WORK],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    assert child.stdout.readline() == "ready False None False\n"
    os.killpg(child.pid, signal.SIGTERM)
    assert child.stdout.readline() == "saving\n"
    assert child.communicate("\n\n", timeout=60)[0] == "saved SIGTERM\nending\n"
    assert child.returncode == 0


def test_a_signal_that_another_process_of_the_run_got_is_ours_too():
    interrupt = Interrupt()
    assert not interrupt.signalled
    interrupt.hear()

    assert interrupt()
    assert (interrupt.signalled, interrupt.reason) == (True, "SIGTERM")
