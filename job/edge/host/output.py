"""Standard output and error that outlive their reader: a run does not end because its log cannot be written."""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TextIO, cast

_STANDARD = (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w"))


class LastingOutput:
    """A text stream that drops what cannot be written: its other end is closed, or its disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop the text."""
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
    out, err = LastingOutput(sys.stdout), LastingOutput(sys.stderr)
    with contextlib.redirect_stdout(cast("TextIO", out)), contextlib.redirect_stderr(cast("TextIO", err)):
        try:
            yield
        finally:
            out.end()
            err.end()


def open_standard_streams() -> None:
    """Open to nowhere what we were started without, before a file gets its descriptor and what libraries print."""
    for name, descriptor, mode in _STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
