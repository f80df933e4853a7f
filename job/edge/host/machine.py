"""The machine around the job: room and rights in the work folder, memory, CPUs and what a container may use of them."""

import errno
import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from job.core.errors import LocalDiskError
from job.core.plan.memory import GIB

_PROBE = b"\0" * 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is; None where the system does not report it."""

    workdir: str
    disk_bytes: int
    """Size of the file system that the work folder is on."""
    free_bytes: int
    """Room for us on it."""
    memory_bytes: int
    """Memory of the whole machine."""
    memory_limit_bytes: int | None
    """Memory of this container, where it has less than the machine."""
    cpus: float
    """Usable here: the fewest of the machine's, of those this process may run on, and of the container's share."""
    shm_bytes: int | None
    """Size of /dev/shm. The job itself needs none: its processes speak through pipes, and one GPU has no peers to share
    memory with."""


def look_at_machine(workdir: Path, *, needed_bytes: int = 0, root: Path = Path("/")) -> Machine:
    """Make the work folder, write into it, and see what the machine has.

    Args:
        workdir: the work folder.
        needed_bytes: what is still to be written below it; 0 when that is not known.
        root: where /proc, /sys and /dev are.

    Raises:
        LocalDiskError: it cannot be made or written, or has too little room.
    """
    workdir = workdir.absolute()
    disk_bytes, free_bytes = _try_workdir(workdir)
    if free_bytes < needed_bytes:
        raise LocalDiskError(
            f"{workdir}: {_size(free_bytes)} are free, and {_size(needed_bytes)} are needed; give the work folder more "
            "room, or name another one with --workdir"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = _memory_limits(root)
    limit = min(limits, default=memory)
    return Machine(
        workdir=str(workdir),
        disk_bytes=disk_bytes,
        free_bytes=free_bytes,
        memory_bytes=memory,
        memory_limit_bytes=limit if limit < memory else None,
        cpus=min([_allowed_cpus(), *_cpu_shares(root)]),
        shm_bytes=_total_bytes(root / "dev/shm"),
    )


def system_name() -> str:
    """The distribution around this process, where it names itself, and the kernel that it runs on."""
    try:
        named = f"{platform.freedesktop_os_release()['PRETTY_NAME']}, "
    except (OSError, KeyError):
        named = ""
    return f"{named}{platform.system()} {platform.release()} {platform.machine()}"


def processor_name(root: Path = Path("/")) -> str | None:
    """What the processor calls itself; None: the kernel does not say."""
    found = re.search(r"^model name[ \t]*:[ \t]*(\S.*?)[ \t]*$", _read(root / "proc/cpuinfo") or "", re.MULTILINE)
    return found[1] if found else None


def _try_workdir(workdir: Path) -> tuple[int, int]:
    """Bytes of its file system: in all, and free for us."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as probe:
            probe.write(_PROBE)
            probe.flush()
            os.fsync(probe.fileno())  # some file systems refuse only here
        disk = shutil.disk_usage(workdir)
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "name another work folder with --workdir")
        raise LocalDiskError(f"{workdir}: cannot be written ({error.strerror or error}); {remedy}") from error
    return disk.total, disk.free


_REMEDIES = {
    errno.ENOSPC: "give the work folder more room (bytes or inodes), or name another one with --workdir",
    errno.EDQUOT: "raise the quota, or name another work folder with --workdir",
    errno.EROFS: "mount a writable volume there, or name another work folder with --workdir",
    errno.EACCES: "let this user write there, or name another work folder with --workdir",
}


def _size(count: int) -> str:
    return f"{count:,} bytes ({count / GIB:.1f} GiB)"


def _total_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return None


def _allowed_cpus() -> float:
    if hasattr(os, "sched_getaffinity"):
        return float(len(os.sched_getaffinity(0)))
    return float(os.cpu_count() or 1)


def _memory_limits(root: Path) -> list[int]:
    """Limits of every group above this process, in both versions of cgroups; `max` and what is no number are none."""
    texts = [
        *(_read(folder / "memory.max") for folder in _groups(root, "")),
        *(_read(folder / "memory.limit_in_bytes") for folder in _groups(root, "memory")),
    ]
    return [int(text) for text in texts if text is not None and text.isdecimal()]


def _cpu_shares(root: Path) -> list[float]:
    shares = [
        *((_read(folder / "cpu.max") or "").split() for folder in _groups(root, "")),
        *(
            [_read(folder / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
            for folder in _groups(root, "cpu")
        ),
    ]
    # A quota of `max` or -1 is none.
    return [int(s[0]) / int(s[1]) for s in shares if len(s) == 2 and all(n.isdecimal() and int(n) for n in s)]  # noqa: PLR2004 quota and period


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of the groups that this process is in, from its own up; `` is the one tree of version 2.

    A container often sees its own group as the top of the tree while /proc names it by its place outside: the top is
    always among them.
    """
    top = root / "sys/fs/cgroup" / controller
    found = [top]
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _number, _, rest = line.partition(":")
        names, _, place = rest.partition(":")
        if controller in names.split(","):
            parts = [part for part in place.split("/") if part not in {"", "..", "."}]
            found += [top.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
