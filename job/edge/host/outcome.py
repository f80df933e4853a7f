"""The outcome file: one small JSON that reports to a scheduler, and to people, how the job stands and how it ended."""

import json
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from job.core.visible import visible
from job.edge.host.logs import redact

LIMIT_BYTES = 4096
"""A container's termination message is cut there, in the middle of a character if need be."""
_WRITE_EVERY_SECONDS = 1.0
_STANDING = ("phase", "step", "of", "loss", "eta_seconds", "tokens_per_second")
_CUT_FIRST = ("reason", "action", "run_uri", "phase")
Follower = Callable[[Mapping[str, Any]], None]
"""Gets what the file says, each time that it is due to be written."""
log = structlog.get_logger(__name__)


class Outcome:
    """Writes the file: replaced as a whole while that works, rewritten in place where the file is a mount of its own.

    It is news, not state: a file that cannot be written costs one warning and never the job.
    """

    def __init__(self, path: Path | None, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._path = None if path is None else Path(os.path.realpath(path))
        self._lock = threading.Lock()
        self._standing: dict[str, Any] = {}
        self._safe: dict[str, Any] = {}
        """What a killed process leaves behind: where its run stands, and the last committed step."""
        self._followers: list[Follower] = []
        self._written_at = -math.inf
        self._in_place = False
        self._given_up = self._path is None
        self._ended = False

    def follow(self, follower: Follower) -> None:
        """Let another file say the same as this one, also where this one has no path."""
        self._followers.append(follower)

    def progress(
        self,
        *,
        phase: str,
        step: int | None = None,
        of: int | None = None,
        loss: float | None = None,
        eta_seconds: float | None = None,
        tokens_per_second: float | None = None,
    ) -> None:
        """Report what the job does now; at most one write a second, a new phase and the last step at once."""
        with self._lock:
            changed = phase != self._standing.get("phase") or (step is not None and step == of)
            self._standing = {"phase": phase, "step": step, "of": of, "loss": loss, "eta_seconds": eta_seconds}
            self._standing["tokens_per_second"] = tokens_per_second
            due = time.monotonic() - self._written_at >= _WRITE_EVERY_SECONDS
            if changed or due:
                self._write_running()

    def relay(self, said: Mapping[str, Any]) -> None:
        """Report what the process that does the work says of itself in its own outcome file."""
        standing = {name: said.get(name) for name in _STANDING}
        safe = {name: said.get(name) for name in ("last_committed_step", "run_uri")}
        with self._lock:
            if (standing, safe) != (self._standing, self._safe):
                self._standing, self._safe = standing, safe
                self._write_running()

    def safe(self, *, run_uri: str | None, last_committed_step: int | None) -> None:
        """Report what stays whatever happens, at once: a process that is killed next says nothing more."""
        facts = {"last_committed_step": last_committed_step, "run_uri": run_uri}
        with self._lock:
            if facts != self._safe:
                self._safe = facts
                self._write_running()

    def end(
        self,
        *,
        code: int,
        again: str,
        reason: str,
        last_committed_step: int | None = None,
        run_uri: str | None = None,
        action: str | None = None,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        """Report how it ended: the exit code, why, what is safe, and what to do. Nothing is written after it.

        Args:
            code: the exit code.
            again: whether starting the same job again helps, in the table's words.
            reason: why.
            last_committed_step: what is safe.
            run_uri: where.
            action: what to do.
            beside: what one process of several says to their supervisor.
        """
        with self._lock:
            self._ended = True
            self._write(
                {
                    "state": "ended",
                    "code": code,
                    "again": again,
                    "reason": visible(redact(reason)),
                    "action": action,
                    "last_committed_step": last_committed_step,
                    "run_uri": run_uri,
                    "phase": self._standing.get("phase"),
                    "step": self._standing.get("step"),
                    "of": self._standing.get("of"),
                    **(beside or {}),
                }
            )

    def _write_running(self) -> None:
        if not self._ended:
            self._write({"state": "running", **self._standing, **self._safe})

    def _write(self, values: dict[str, Any]) -> None:
        self._written_at = time.monotonic()
        for follower in self._followers:
            follower(values)
        if self._given_up or self._path is None:
            return
        content = encode({**values, "time": datetime.now(UTC).isoformat(timespec="seconds")}, self._limit_bytes)
        try:
            self._place(self._path, content)
        except OSError as error:
            # News that nobody can read is no reason to lose a night of training.
            self._given_up = True
            log.warning("outcome_not_written", path=str(self._path), reason=str(error))

    def _place(self, path: Path, content: bytes) -> None:
        if not self._in_place and (not path.exists() or path.is_file()):
            try:
                replace_file(path, content)
            except OSError:
                # A file that is bind-mounted, or whose folder is read-only, cannot be renamed over.
                self._in_place = True
            else:
                return
        _rewrite(path, content)


def replace_file(path: Path, content: bytes) -> None:
    """Put the content in the file's place: who reads it finds all of the old or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.unlink(missing_ok=True)  # of a process that died, or a link that somebody laid there
        with beside.open("xb") as file:
            file.write(content)
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise


def _rewrite(path: Path, content: bytes) -> None:
    # Without O_NONBLOCK a pipe that nobody reads would hold the job. Links were followed as it began, and no more.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(f"{path} is not a regular file")
        # Blanks over the rest of the old text, then the cut: whoever reads in between still reads valid JSON.
        os.write(descriptor, content.ljust(about.st_size))
        os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)


def encode(values: dict[str, Any], limit_bytes: int = LIMIT_BYTES) -> bytes:
    """As JSON of at most so many bytes; the long texts are cut, the reason first, never inside a character."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    shown = {key: value for key, value in finite.items() if value is not None or key == "loss"}
    for key in _CUT_FIRST:
        text = shown.get(key)
        if len(_dump(shown)) <= limit_bytes:
            break
        if isinstance(text, str):
            shown[key] = _longest_that_fits(shown, key, text, limit_bytes)
    return _dump(shown)


def _longest_that_fits(values: dict[str, Any], key: str, text: str, limit_bytes: int) -> str:
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if len(_dump({**values, key: text[:middle] + "…"})) <= limit_bytes:
            fits = middle
        else:
            too_long = middle
    return text[:fits] + "…"


def _dump(values: dict[str, Any]) -> bytes:
    # Lone surrogates come from file names that are not UTF-8.
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
