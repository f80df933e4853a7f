"""Runs a command with a limit, or watches one under way; what it starts dies with it."""

import json
import os
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

_LOOK_SECONDS = 0.05


class NoResultError(Exception):
    """A command that did not do what it should, and why: one line."""


def run(command, *, limit_seconds, log, environment=()):
    """What the command wrote to stdout. All its output stays in `log`.out and `log`.err.

    Raises:
        NoResultError: it failed, or was killed at the limit.
    """
    with begun(command, limit_seconds=limit_seconds, log=log, environment=environment) as running:
        return running.output()


class Running:
    """A run of the product under way, whose log is followed."""

    def __init__(self, child, out, err, limit_seconds):
        self.pid, self._child, self._out, self._err = child.pid, child, out, err
        self._limit_seconds = limit_seconds
        self._until = time.monotonic() + limit_seconds

    def events(self):
        """What it has logged so far."""
        lines = self._out.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def until(self, seen):
        """The first event that satisfies a condition.

        Raises:
            NoResultError: it ended, or its time did, before.
        """
        while True:
            ended = self._child.poll()
            found = next(filter(seen, self.events()), None)
            if found is not None:
                return found
            if ended is not None:
                raise NoResultError(f"ended with {ended} before what was waited for")
            if time.monotonic() > self._until:
                raise NoResultError("its time was over before what was waited for")
            time.sleep(_LOOK_SECONDS)

    def end(self):
        """Wait for its exit code.

        Raises:
            NoResultError: its time was over.
        """
        try:
            return self._child.wait(max(0.0, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise NoResultError("it did not end in its time") from None

    def output(self):
        """What it wrote to stdout, once it has ended.

        Raises:
            NoResultError: it failed, or its time was over.
        """
        try:
            code = self._child.wait(max(0.0, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise NoResultError(f"no result within {self._limit_seconds:g} s; at last {self._said()}") from None
        if code:
            raise NoResultError(f"ended with {code}: {self._said()}")
        return self._out.read_text(errors="replace")

    def _said(self):
        return _reason(self._err.read_text(errors="replace") or self._out.read_text(errors="replace"))


@contextmanager
def begun(command, *, limit_seconds, log, environment=()):
    """A command under way; whatever happens, it does not outlive the block. Its output stays as `run` says."""
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    with out.open("wb") as stdout, err.open("wb") as stderr:
        child = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, start_new_session=True, env=os.environ | dict(environment)
        )
    try:
        yield Running(child, out, err, limit_seconds)
    finally:
        _end(child)


def workers_of(supervisor):
    """Rank -> process, of the workers of a run that are still there; the launcher under its name."""
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                given = dict(
                    pair.partition("=")[::2]
                    for pair in (place / "environ").read_bytes().decode(errors="replace").split("\0")
                )
                gone = (place / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if given.get("JOB_SUPERVISOR_PID") == str(supervisor) and not gone:
                found[int(given["RANK"]) if "RANK" in given else "launcher"] = int(place.name)
    return found


def _end(child):
    """The whole session: workers outlive a parent that was killed."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()


def _reason(output, longest=300):
    """The last line that looks like an exception, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines)[-1][:longest]
