"""Standard output and error that outlive their reader: a run does not end because its log cannot be written."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TextIO, cast

_ERASE = "\r\x1b[K"
"""Back to the first column, and nothing behind it (ECMA-48: CR, EL)."""
_WIDTH = 80
"""Of a terminal that does not know its own."""
_STANDARD = (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w"))


class PassingLine:
    """The line of a terminal that the next text replaces; standard output and error share one terminal."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.on: LastingOutput | None = None
        """Where it stands now."""

    def erase(self) -> None:
        """Leave an empty line where it stood."""
        stood_on, self.on = self.on, None
        if stood_on is not None:
            stood_on.write(_ERASE)
            stood_on.flush()


class LastingOutput:
    """A text stream that drops what cannot be written: its other end is closed, or its disk is full."""

    def __init__(self, stream: TextIO, passing: PassingLine | None = None) -> None:
        """Both streams of one terminal get the same `passing`."""
        self._stream = stream
        self._passing = passing or PassingLine()

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        # Without one, nobody waits: another stream may hang, and this one is to say so.
        if self._passing.on is not None:
            with self._passing.lock:
                self._passing.erase()
        return self._write(text)

    def write_passing(self, text: str) -> None:
        """Write a line, without its end, that the next text on either stream replaces."""
        with self._passing.lock:
            self._passing.erase()
            self._write(text)
            self.flush()
            self._passing.on = self

    def _write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what is buffered."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def end(self) -> None:
        """Flush for the last time: what cannot be written now never will be, and must not make the exit code 120."""
        self._passing.erase()
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def _drop(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            self._let_go()
        # Otherwise a disk is full, which may pass: what is buffered is tried again with the next line.

    def _let_go(self) -> None:
        # What is still in the buffer goes the same way: otherwise the interpreter's last flush fails, and exits 120.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Whoever reads what is written within the block may go, and its disk may be full."""
    passing = PassingLine()
    out, err = LastingOutput(sys.stdout, passing), LastingOutput(sys.stderr, passing)
    with contextlib.redirect_stdout(cast("TextIO", out)), contextlib.redirect_stderr(cast("TextIO", err)):
        try:
            yield
        finally:
            out.end()
            err.end()


def say_passing(text: str, *, dumb: bool) -> None:
    """Write to a terminal what the next text replaces; nothing to one that cannot do so, and nothing elsewhere."""
    if isinstance(sys.stdout, LastingOutput) and sys.stdout.isatty() and not dumb:
        sys.stdout.write_passing(text)


class Lines:
    """structlog's logger: one event, one line or several, never in the middle of another one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, text: str, *, passing: bool = False) -> None:
        """Write; what is passing is replaced by the next text, where the stream can do so."""
        with _WRITING:
            if passing and isinstance(self._stream, LastingOutput):
                self._stream.write_passing(text)
            else:
                self._stream.write(f"{text}\n")
                self._stream.flush()

    debug = info = warning = warn = error = critical = exception = fatal = msg


_WRITING = threading.RLock()


def terminal_width(stream: TextIO) -> int | None:
    """Columns of the terminal that a stream writes to now; None: it is none."""
    try:
        return (os.get_terminal_size(stream.fileno()).columns or _WIDTH) if stream.isatty() else None
    except (OSError, ValueError):
        return _WIDTH


def open_standard_streams() -> None:
    """Open to nowhere what we were started without, before a file gets its descriptor and what libraries print."""
    for name, descriptor, mode in _STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
