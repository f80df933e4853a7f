"""A terminal of so many columns: what a process writes to it, and what a person then sees."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
import threading
import unicodedata
from collections.abc import Iterator
from typing import IO

_ROWS = 24
_CONTROL = re.compile(r"\x1b\[(?P<number>\d*(?:;\d+)*)(?P<letter>[A-Za-z])")


class Terminal:
    """The other end of a pseudo-terminal; what is written there is read all the time, so that nobody waits."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
        self.writer: IO[bytes] = os.fdopen(theirs, "wb", buffering=0)
        """For the process's standard output and error."""
        self._read = bytearray()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # the way a pseudo-terminal says that the other end is closed
            while chunk := os.read(self._ours, 1 << 16):
                self._read += chunk

    def text(self) -> str:
        """All that was written, once every writer has gone."""
        self.writer.close()
        self._reader.join()
        os.close(self._ours)
        return self._read.decode().replace("\r\n", "\n")


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[Terminal]:
    shown = Terminal(columns)
    try:
        yield shown
    finally:
        shown.writer.close()


def lines_seen(text: str) -> list[str]:
    """The lines that are left on a terminal without an end to its right, and none of its colours.

    A line that was replaced is not among them; how wide any was is for `widest`.
    """
    seen = []
    for line in text.split("\n"):
        at, cells = 0, []
        for piece in _pieces(line):
            if piece == "\r":
                at = 0
            elif piece.startswith("\x1b"):
                control = _CONTROL.fullmatch(piece)
                assert control, repr(piece)
                assert control["letter"] in "mK", f"{piece!r}: a terminal was told more than colours and to erase"
                if control["letter"] == "K":
                    del cells[at:]
            else:
                cells[at : at + 1] = [piece]
                at += 1
        seen.append("".join(cells).rstrip())
    return seen


def written_lines(text: str) -> list[str]:
    """Every line that ever stood there, replaced ones too, without colours."""
    return [re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", each) for each in re.split(r"[\r\n]", text)]


def columns_of(line: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def too_wide(text: str, columns: int) -> list[str]:
    """Lines that would wrap; a path or URI that alone is longer than a line is none of them."""
    return [
        line for line in written_lines(text) if columns_of(line) > columns and not ("/" in line and " " not in line)
    ]


def _pieces(line: str) -> Iterator[str]:
    at = 0
    while at < len(line):
        control = _CONTROL.match(line, at)
        piece = control[0] if control else line[at]
        yield piece
        at += len(piece)
