"""A wall clock that jumps: in this process, and in one that is started with it, as when a machine's clock is set."""

import mmap
import random
import struct
import subprocess
import time
from pathlib import Path

HOUR = 3600.0
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static volatile long *offset;
static int (*real)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int file = open(getenv("CLOCK_OFFSET_FILE"), O_RDONLY);
    if (file < 0) abort();
    offset = mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (offset == MAP_FAILED) abort();
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (!real) begin();
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *offset;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec found;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &found)) return -1;
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec found;
    if (clock_gettime(CLOCK_REALTIME, &found)) return -1;
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}
"""


class SettableClock:
    """The wall clock of processes that are started with its environment; the monotonic one is left alone."""

    def __init__(self, folder: Path) -> None:
        source, library, offset = folder / "clock.c", folder / "clock.so", folder / "offset"
        source.write_text(_SOURCE)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        offset.write_bytes(bytes(mmap.PAGESIZE))
        with offset.open("r+b") as file:
            self._offset = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(offset)}

    def set(self, *, hours: float) -> None:
        """Away from the true time, from now on."""
        self._offset[:8] = struct.pack("q", int(hours * HOUR))


def jump_at_each_look(monkeypatch, *, seed: int = 0) -> None:
    """`time.time` is hours off in this process, each time elsewhere."""
    true, draw = time.time, random.Random(seed)
    monkeypatch.setattr(time, "time", lambda: true() + draw.uniform(-48, 48) * HOUR)
