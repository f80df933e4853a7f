"""What stands around an attempt: little patience, a disk that fills, a clock that jumps. Read before it begins.

CHAOS_IMPATIENT             a store that is away for a second is away for too long
CHAOS_FREEZES_IN            it stops as by SIGSTOP when it enters this phase
CHAOS_FILLS_IN, CHAOS_DISK  the disk at this path, a tmpfs of the attempt's own, is filled when it enters this phase
CHAOS_CLOCK                 a file with one number: seconds that the clock is ahead of the system's
CHAOS_RANK                  of several processes the one in which the disk fills, which is their supervisor's
"""

import contextlib
import ctypes
import mmap
import os
import signal
import struct
import time
from pathlib import Path

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000
DISK_BYTES = 64 * 1024 * 1024


def be_impatient():
    from job.edge.run import publisher
    from job.edge.store.patience import STORE_PATIENCE

    settings = {"attempts": 3, "budget_seconds": 1.0, "first_pause_seconds": 0.05, "longest_pause_seconds": 0.1}
    for name, value in settings.items():
        object.__setattr__(STORE_PATIENCE, name, value)
    publisher._PATIENCE_SECONDS = publisher._HELD_UP_SECONDS = 1.0
    publisher.Publisher.__init__.__kwdefaults__["pause_seconds"] = 0.1


def mount_disk(disk):
    """In a mount namespace of our own: it goes with the process."""
    system = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if system.unshare(NEW_MOUNTS | (NEW_USER if user else 0)):
        raise OSError(ctypes.get_errno(), "no mounts of our own: `make chaos` needs root or user namespaces")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    disk.mkdir(parents=True, exist_ok=True)
    private, recursive = 1 << 18, 1 << 14
    system.mount(None, b"/", None, private | recursive, None)
    if system.mount(b"tmpfs", bytes(disk), b"tmpfs", 0, b"size=%d" % DISK_BYTES):
        raise OSError(ctypes.get_errno(), f"no tmpfs on {disk}")


def before(phase_wanted, do):
    """Do something when the attempt enters a phase for the first time."""
    from job.stages.attempt import Phases

    enter, left = Phases.phase, [do]

    @contextlib.contextmanager
    def phase(self, name):
        if name == phase_wanted and left:
            left.pop()()
        with enter(self, name):
            yield

    Phases.phase = phase


def fill(path):
    """To the last byte: what is written from here on finds no room."""
    with path.open("ab", buffering=0) as file:
        for piece in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(piece)) == piece:
                    pass


def follow_clock(path):
    with path.open("rb") as file:
        ahead = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    monotonic = time.monotonic
    time.monotonic = lambda: monotonic() + struct.unpack_from("d", ahead)[0]


if "CHAOS_IMPATIENT" in os.environ:
    be_impatient()
if "CHAOS_FREEZES_IN" in os.environ:
    before(os.environ["CHAOS_FREEZES_IN"], lambda: os.kill(os.getpid(), signal.SIGSTOP))
if "CHAOS_FILLS_IN" in os.environ:
    disk = Path(os.environ["CHAOS_DISK"])
    if "CHAOS_RANK" not in os.environ or "JOB_SUPERVISOR_PID" not in os.environ:
        mount_disk(disk)
    if os.environ.get("CHAOS_RANK") == os.environ.get("RANK"):
        before(os.environ["CHAOS_FILLS_IN"], lambda: fill(disk / ".filler"))
if "CHAOS_CLOCK" in os.environ:
    follow_clock(Path(os.environ["CHAOS_CLOCK"]))
