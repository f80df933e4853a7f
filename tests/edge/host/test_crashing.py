"""What an armed crash point does, on real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from job.core.errors import UsageError
from job.edge.host.crashing import arm, disarm

ROOT = Path(__file__).parents[3]
WORK = """
import sys, threading
from job.core.crash_points import crash_point
from job.edge.host.crashing import arm

arm(sys.argv[1])

def save():
    for step in (1, 2, 3):
        print("begin", step, flush=True)
        crash_point("save.middle")
        print("end", step, flush=True)

def catch():
    try:
        save()
    except RuntimeError as error:
        print("caught", error, flush=True)

try:
    thread = threading.Thread(target=catch)
    thread.start()
    thread.join()
finally:
    print("cleaned up", flush=True)
"""
TO_THE_SECOND = ["begin 1", "end 1", "begin 2"]


def started(spec):
    return subprocess.Popen([sys.executable, "-c", WORK, spec], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def run(spec):
    child = started(spec)
    said, _ = child.communicate(timeout=60)
    return child.returncode, said.splitlines()


def test_kill_ends_it_there_and_nothing_is_cleaned_up():
    """Not even one more line by the thread that stood at the point."""
    assert run("save.middle:2=kill") == (-signal.SIGKILL, TO_THE_SECOND)


def test_exit_ends_it_as_a_shell_tells_of_a_kill():
    """For the first process of a container, which cannot kill itself."""
    assert run("save.middle:2=exit") == (137, TO_THE_SECOND)


def test_error_is_raised_there():
    assert run("save.middle:2=error") == (0, [*TO_THE_SECOND, "caught crash point save.middle", "cleaned up"])


def test_freeze_stops_it_there_until_it_is_continued():
    child = started("save.middle:2=freeze")
    try:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        os.set_blocking(child.stdout.fileno(), False)
        assert os.read(child.stdout.fileno(), 10_000).decode().splitlines() == TO_THE_SECOND
        os.set_blocking(child.stdout.fileno(), True)

        child.send_signal(signal.SIGCONT)

        said, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, said.splitlines()) == (0, ["end 2", "begin 3", "end 3", "cleaned up"])


def test_a_wrong_order_arms_nothing():
    with pytest.raises(UsageError):
        arm("save.middle=burn")


def test_what_is_disarmed_does_nothing():
    from job.core.crash_points import crash_point

    arm("save.middle=error")
    disarm()

    crash_point("save.middle")
