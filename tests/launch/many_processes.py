"""The processes behind one command that works with several: found by what their supervisor has put into them."""

import contextlib
import os
import signal
import time
from pathlib import Path


def workers_of(supervisor):
    """Rank -> process, of those that are there."""
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                given = dict(
                    pair.partition("=")[::2] for pair in (place / "environ").read_bytes().decode().split("\0") if pair
                )
                if given.get("JOB_SUPERVISOR_PID") == str(supervisor) and _lives(place):
                    found[int(given["RANK"]) if "RANK" in given else "launcher"] = int(place.name)
    return found


def _lives(place):
    return (place / "stat").read_text().rpartition(")")[2].split()[0] != "Z"


def until(seen, *, seconds=60.0):
    """Wait for something; what was seen last."""
    deadline = time.monotonic() + seconds
    while not (found := seen()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def nothing_is_left(supervisor):
    """No process outlives the command; the last ones may take a moment to be gone."""
    return until(lambda: not workers_of(supervisor), seconds=20.0)


def strike(supervisor, whom, number=signal.SIGKILL):
    """A signal to a rank, the launcher, or the supervisor itself."""
    os.kill(supervisor if whom == "supervisor" else workers_of(supervisor)[whom], number)
