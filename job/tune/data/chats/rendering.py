"""The process that renders chats, as its owner sees it: asked by the batch, and ended when a template does not end."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from job.core.errors import JobError, StopRequestedError

_FROM_OUTSIDE = (-9, -15)
"""How a process ends that somebody else ends: the system that has no memory left, or a person."""
_ROOT = Path(__file__).parents[4]
_LOOK_SECONDS = 0.2
_PIECE = 2**20


class Renderer:
    """Renders with one template; the process is begun with the first question, and anew where it was ended."""

    def __init__(self, setup: Mapping[str, Any], *, should_stop: Callable[[], bool]) -> None:
        """With what `sandbox.main` is set up with."""
        self._setup = setup
        self._should_stop = should_stop
        self._process: subprocess.Popen[bytes] | None = None
        self._left = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def render(self, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The answers, in the questions' order, as `sandbox` gives them; at one that is `fatal` they end.

        Raises:
            StopRequestedError: asked to stop.
        """
        answers: list[dict[str, Any]] = []
        for _attempt in range(2):
            process, first = self._begun()
            if first is None or "fatal" in first:
                return self._ended([] if first is None else [first])
            # It reads all of it before it answers, so that neither waits for the other.
            self._write(process, asked[len(answers) :])
            answers += self._read(process, len(asked) - len(answers))
            if len(answers) == len(asked) and "fatal" not in answers[-1]:
                return answers
            if process.wait() not in _FROM_OUTSIDE:
                return self._ended(answers)
            self.close()
        raise JobError("the process that renders chats was ended from outside twice; give the job more memory")

    def close(self) -> None:
        """End the process, if there is one: it has nothing to lose."""
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()
        self._process, self._left = None, b""

    def _begun(self) -> tuple["subprocess.Popen[bytes]", dict[str, Any] | None]:
        """The process, and what it says of the template: nothing; why it cannot be used; None where it ended."""
        if self._process is not None:
            return self._process, {}
        self._process = subprocess.Popen(
            [sys.executable, "-E", "-s", "-m", "job.tune.data.chats.sandbox"],
            cwd=_ROOT,
            env={"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},  # nothing of ours: a template is a stranger
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the job
        )
        self._write(self._process, self._setup)
        return self._process, next(iter(self._read(self._process, 1)), None)

    def _ended(self, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers of a process that a template brought to its end, with the reason as the last."""
        self.close()
        if answers and "fatal" in answers[-1]:
            return answers
        seconds, mib = self._setup["seconds"], self._setup["most_bytes"] >> 20
        reason = f"does not come to an end in {seconds} seconds of computing and {mib:,} MiB of memory"
        return [*answers, {"fatal": reason}]

    @staticmethod
    def _write(process: "subprocess.Popen[bytes]", value: object) -> None:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # reading says how it ended
            process.stdin.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            process.stdin.flush()

    def _read(self, process: "subprocess.Popen[bytes]", count: int) -> Iterator[dict[str, Any]]:
        """That many lines, fewer where the process ends."""
        assert process.stdout is not None
        pieces, descriptor = [self._left], process.stdout.fileno()
        while count:
            line, newline, rest = pieces[-1].partition(b"\n")
            if newline:
                yield json.loads(b"".join([*pieces[:-1], line]))
                pieces, count = [rest], count - 1
                continue
            while not select.select([descriptor], [], [], _LOOK_SECONDS)[0]:
                if self._should_stop():
                    self.close()
                    raise StopRequestedError("asked to stop while rendering chats")
            piece = os.read(descriptor, _PIECE)
            if not piece:
                return
            pieces.append(piece)
        self._left = pieces[0]
