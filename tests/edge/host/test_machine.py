"""The machine around the job: the real work folder, and systems as files where another kernel is needed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from job.core.errors import LocalDiskError
from job.edge.host import machine
from job.edge.host.machine import look_at_machine, processor_name, system_name

ROOT = Path(__file__).parents[3]
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GIB = 1 << 30


@pytest.fixture
def system(tmp_path):
    """Writes files as /proc and /sys have them; returns their root."""
    root = tmp_path / "root"

    def write(files):
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return root

    root.mkdir()
    return write


# --- the work folder -------------------------------------------------------------------------------------------------


def test_the_work_folder_is_made_and_left_empty(tmp_path):
    found = look_at_machine(tmp_path / "deep" / "work")

    assert list((tmp_path / "deep" / "work").iterdir()) == []
    assert found.workdir == str(tmp_path / "deep" / "work")
    assert 0 < found.free_bytes <= found.disk_bytes == shutil.disk_usage(tmp_path).total


def test_a_folder_with_too_little_room_says_what_is_free_and_what_is_needed(tmp_path):
    needed = shutil.disk_usage(tmp_path).total + 1

    with pytest.raises(LocalDiskError) as caught:
        look_at_machine(tmp_path, needed_bytes=needed)

    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert f"{needed:,} bytes ({needed / GIB:.1f} GiB) are needed" in str(caught.value)
    assert "bytes (" in str(caught.value).partition(" are free")[0]
    assert "--workdir" in str(caught.value)


def test_room_to_the_byte_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(100, 58, 42))

    assert look_at_machine(tmp_path, needed_bytes=42).free_bytes == 42
    with pytest.raises(LocalDiskError, match="43 bytes"):
        look_at_machine(tmp_path, needed_bytes=43)


def test_a_folder_below_a_file_is_the_local_disks_fault(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(LocalDiskError, match=r"work: cannot be written \(Not a directory\); name another work folder"):
        look_at_machine(tmp_path / "file" / "work")


LOOK = """
import resource, sys
from pathlib import Path
from job.core.errors import LocalDiskError
from job.edge.host.machine import look_at_machine, processor_name, system_name

if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    look_at_machine(Path(sys.argv[1]))
except LocalDiskError as error:
    print(error)
"""


def look_in_a_process(*command):
    done = subprocess.run(
        [*command], capture_output=True, text=True, timeout=60, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    return done.stdout.strip()


def test_a_file_system_that_takes_no_byte_is_the_local_disks_fault(tmp_path):
    """Room by the numbers is not room: a quota says no when something is written."""
    said = look_in_a_process(sys.executable, "-c", LOOK, str(tmp_path), "no bytes")

    assert said == f"{tmp_path}: cannot be written (File too large); name another work folder with --workdir"


@pytest.fixture
def mounts(tmp_path):
    """Runs a look in a mount namespace of its own, after `mount` with the given options at the work folder."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("needs the right to mount")
    workdir = tmp_path / "mounted"
    workdir.mkdir()

    def look(options):
        script = f'mount -t tmpfs -o {options} tmpfs "$1" && exec "$2" -c "$3" "$1"'
        return workdir, look_in_a_process(
            "/usr/bin/unshare", "--mount", "/bin/sh", "-c", script, "sh", str(workdir), sys.executable, LOOK
        )

    return look


def test_a_read_only_folder_is_refused_at_once(mounts):
    workdir, said = mounts("ro")

    assert said.startswith(f"{workdir}: cannot be written (Read-only file system); mount a writable volume there")


def test_a_full_folder_is_refused_whether_bytes_or_inodes_are_gone(mounts):
    workdir, said = mounts("size=4k,nr_inodes=1")

    assert said.startswith(f"{workdir}: cannot be written (No space left on device); give the work folder more room")


# --- memory, CPUs and what a container may use -----------------------------------------------------------------------


def test_this_machine_is_told_as_it_is(tmp_path):
    found = look_at_machine(tmp_path)

    assert found.memory_bytes == MEMORY
    assert found.memory_limit_bytes is None or 0 < found.memory_limit_bytes < MEMORY
    assert 0 < found.cpus <= len(os.sched_getaffinity(0))
    assert found.shm_bytes is None or found.shm_bytes == shutil.disk_usage("/dev/shm").total


def test_a_system_that_says_nothing_has_no_limits(tmp_path, system):
    found = look_at_machine(tmp_path / "work", root=system({}))

    assert found.memory_limit_bytes is None
    assert found.cpus == len(os.sched_getaffinity(0))
    assert found.shm_bytes is None


V2_INSIDE = {
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": "1073741824\n",
    "sys/fs/cgroup/cpu.max": "50000 100000\n",
}
V2_SLICE = {
    "proc/self/cgroup": "0::/user.slice/job.scope\n",
    "sys/fs/cgroup/user.slice/memory.max": "1073741824\n",
    "sys/fs/cgroup/user.slice/cpu.max": "50000 100000\n",
    "sys/fs/cgroup/user.slice/job.scope/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/job.scope/cpu.max": "max 100000\n",
}
V1_INSIDE = {
    "proc/self/cgroup": "4:memory:/docker/ab12\n2:cpu,cpuacct:/docker/ab12\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}
V1_OUTSIDE = {
    "proc/self/cgroup": "4:memory:/slurm/uid_1/job_7\n2:cpu,cpuacct:/slurm/uid_1/job_7\n1:name=systemd:/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/slurm/uid_1/job_7/memory.limit_in_bytes": "1073741824\n",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    "sys/fs/cgroup/cpu/slurm/uid_1/job_7/cpu.cfs_quota_us": "50000\n",
    "sys/fs/cgroup/cpu/slurm/uid_1/job_7/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize("files", [V2_INSIDE, V2_SLICE, V1_INSIDE, V1_OUTSIDE])
def test_the_tightest_limit_on_the_way_up_counts_in_both_versions_of_cgroups(tmp_path, system, files):
    """Inside a container its own group is the top; outside it is a branch whose parents limit it as well."""
    found = look_at_machine(tmp_path / "work", root=system(files))

    assert found.memory_limit_bytes == GIB
    assert found.cpus == 0.5


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/cpu.max": "max 100000"},
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        },
        {"sys/fs/cgroup/memory.max": f"{MEMORY}", "sys/fs/cgroup/cpu.max": "900000000 100000"},
        {"sys/fs/cgroup/memory.max": "nonsense", "sys/fs/cgroup/cpu.max": "0 0"},
        {"proc/self/cgroup": "nonsense\n0::/../../elsewhere\n"},
    ],
)
def test_no_limit_and_one_beyond_the_machine_are_none(tmp_path, system, files):
    found = look_at_machine(tmp_path / "work", root=system(files))

    assert found.memory_limit_bytes is None
    assert found.cpus == len(os.sched_getaffinity(0))


def test_the_size_of_shared_memory_is_told(tmp_path, system):
    root = system({"dev/shm/x": ""})

    assert look_at_machine(tmp_path / "work", root=root).shm_bytes == shutil.disk_usage(root).total


# --- what it calls itself --------------------------------------------------------------------------------------------


def test_the_processor_is_called_as_the_kernel_says_or_not_at_all(tmp_path):
    (tmp_path / "proc").mkdir()
    info = tmp_path / "proc/cpuinfo"
    assert processor_name(tmp_path) is None
    info.write_text(
        "processor\t: 0\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R) Platinum 8468 \nmodel name\t: other\n"
    )
    assert processor_name(tmp_path) == "Intel(R) Xeon(R) Platinum 8468"
    info.write_text("processor\t: 0\nCPU part\t: 0xd4f\nmodel name\t:\nflags\t: fpu\n")
    assert processor_name(tmp_path) is None


def test_the_system_is_the_distribution_and_the_kernel(monkeypatch):
    monkeypatch.setattr(machine.platform, "freedesktop_os_release", lambda: {"PRETTY_NAME": "Ubuntu 24.04 LTS"})
    assert system_name() == f"Ubuntu 24.04 LTS, Linux {os.uname().release} {os.uname().machine}"

    def missing():
        raise FileNotFoundError

    monkeypatch.setattr(machine.platform, "freedesktop_os_release", missing)
    assert system_name() == f"Linux {os.uname().release} {os.uname().machine}"
