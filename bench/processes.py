"""Runs a command with a limit; what it starts dies with it."""

import os
import signal
import subprocess


class NoResultError(Exception):
    """A command that did not do what it should, and why: one line."""


def run(command, *, limit_seconds, log, environment=()):
    """What the command wrote to stdout. All its output stays in `log`.out and `log`.err.

    Raises:
        NoResultError: it failed, or was killed at the limit.
    """
    out, err = log.with_suffix(".out"), log.with_suffix(".err")
    with out.open("wb") as stdout, err.open("wb") as stderr:
        child = subprocess.Popen(
            command,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            env=os.environ | dict(environment),
        )
        try:
            code = child.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            raise NoResultError(f"no result within {limit_seconds:g} s") from None
        finally:
            _end(child)
    output = out.read_text(errors="replace")
    if code:
        raise NoResultError(f"ended with {code}: {_reason(err.read_text(errors='replace') or output)}")
    return output


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
