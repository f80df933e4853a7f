"""How long this process has been there, by the system's own clock."""

import os
import time
from pathlib import Path

_START = 19
"""Place of the start time among the fields of /proc/self/stat that follow the program's name."""


def age_seconds(*, root: Path = Path("/")) -> float:
    """Seconds since the system made this process, to a hundredth: the interpreter's start and all imports are in it.

    0 where the system does not report it. A program that a wrapper `exec`s has the wrapper's age: the process is the
    same.

    Args:
        root: where /proc is.
    """
    try:
        stat = (root / "proc/self/stat").read_text(encoding="ascii", errors="replace")
        # The name stands in brackets, and may hold blanks and brackets itself.
        ticks = int(stat.rpartition(")")[2].split()[_START])
    except (OSError, ValueError, IndexError):
        return 0.0
    # Both count from the machine's start, with the time that it slept, and in the same time namespace.
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
