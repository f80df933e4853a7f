"""A real Slurm as a user meets it: submit, look, wait, cancel; and what an administrator does to nodes and limits."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from job_process import ROOT, Job, environment_without_job

HERE = Path(__file__).parent
TRAIN = ROOT / "slurm" / "train.sbatch"
PATIENCE_SECONDS = 900
"""Longest that anything here may take; no test depends on how fast it is."""
POLL_SECONDS = 0.1


def why_not() -> str | None:
    """Why no Slurm can be brought up here; None: it can."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "scontrol") if not shutil.which(name)]
    return f"Slurm is not installed ({', '.join(missing)}); make test-slurm installs it" if missing else None


@contextmanager
def slurm() -> Iterator["Slurm"]:
    """A cluster of our own, taken down at the end of the block."""
    # Not below pytest's folder, which only its owner may enter: munged has a user of its own.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        subprocess.run([HERE / "slurm_up.sh", folder, str(_free_ports(3))], check=True, timeout=PATIENCE_SECONDS)
        yield Slurm(folder)
    finally:
        subprocess.run([HERE / "slurm_down.sh", folder], check=True, timeout=PATIENCE_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> int:
    """First of several free ports in a row, below those that the kernel gives to clients."""
    for first in range(20000 + os.getpid() % 5000, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError(f"no {count} free ports in a row")


def until(condition: Callable[[], object], what: Callable[[], str] | str) -> object:
    """Wait for something, generously."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"waited in vain: {what if isinstance(what, str) else what()}")


class Slurm:
    """The cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
        """A command of Slurm's or of ours, as a user types it; the job gets its environment from it."""
        ours = {"JOB_DEVICE": "cpu", "QLORA_TELL_SECONDS": "1", "QLORA_VENV": sys.prefix}
        ours |= self.environment | environment
        return subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.folder,
            env=environment_without_job(ours),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def asked(self, *command: object) -> str:
        """What a command answers that must work."""
        done = self.call(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def submit(self, cwd: Path, *words: object, **environment: str) -> "Submitted":
        """sbatch, with its options and the script; small, so that several jobs fit the nodes."""
        size = ("--cpus-per-task=1", "--mem=2000")
        done = self.call("sbatch", "--parsable", *size, *words, cwd=cwd, **environment)
        assert done.returncode == 0, done.stderr
        return Submitted(self, done.stdout.strip(), cwd)

    def job(self, number: str, cwd: Path) -> "Submitted":
        """A job that somebody else submitted."""
        return Submitted(self, number, cwd)

    def occupy(self, node: str) -> "Submitted":
        """A job of the partition that preempts the others, which wants all of a node and ends at once."""
        words = ("--partition=high", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=true")
        return self.submit(self.folder, *words)

    def queued(self) -> list[str]:
        return self.asked("squeue", "--noheader", "--format=%i").split()

    def wait_for_all(self) -> None:
        until(lambda: not self.queued(), lambda: self.asked("squeue"))

    def clear(self) -> None:
        """End every job, also one that puts itself back into the queue."""

        def is_clear() -> bool:
            for command in (("--full", "--signal=KILL"), ()):
                for number in self.queued():
                    self.call("scancel", *command, number)
            return not self.queued()

        until(is_clear, lambda: self.asked("squeue"))

    def completed(self, number: str) -> dict[str, str]:
        """What the job completion record says of a job: the last one, where it was started several times."""
        lines = (self.folder / "log" / "completed").read_text().splitlines()
        found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if line.startswith(f"JobId={number} ")]
        return found[-1]


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job in the queue, running or ended."""

    slurm: Slurm
    number: str
    """As Slurm prints it: 12, or 12_3 for a task of an array."""
    cwd: Path

    def about(self) -> dict[str, str]:
        """The fields that Slurm shows."""
        text = self.slurm.asked("scontrol", "show", "job", self.number)
        lines = [line for line in text.splitlines() if not line.startswith("   Comment=")]
        return dict(re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", "\n".join(lines)))

    def comment(self) -> dict:
        """The outcome file as the job's comment shows it."""
        text = self.slurm.asked("scontrol", "show", "job", self.number)
        found = re.search(r"^   Comment=(.*)$", text, re.MULTILINE)
        return json.loads(found[1]) if found else {}

    def log(self) -> str:
        path = Path(self.about()["StdOut"])
        return path.read_text() if path.exists() else ""

    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def named(self, event: str) -> list[dict]:
        return [e for e in self.events() if e.get("event") == event]

    def until_log(self, text: str) -> None:
        until(lambda: text in self.log(), lambda: f"{text!r} in {self.log()}")

    def until_step(self, step: int) -> None:
        """The job itself trains: it has done this step."""
        until(lambda: any(e["step"] >= step for e in self.named("step")), self.log)

    def until_ended(self) -> dict[str, str]:
        """The final state: no longer waiting, running or ending."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "SIGNALING")
        until(lambda: self.about()["JobState"] not in going, lambda: f"{self.about()}\n{self.log()}")
        return self.about()

    def exit_code(self) -> int:
        return int(self.about()["ExitCode"].split(":")[0])

    def restarts(self) -> int:
        return int(self.about()["Restarts"])

    def freeze(self) -> int:
        """Stop the job's process where it is, so that what is done to it comes in time on any machine."""
        (pid,) = [pid for pid in _processes() if "entrypoint.py" in pid[1] and str(self.cwd) in pid[1]]
        os.kill(pid[0], signal.SIGSTOP)
        return pid[0]

    def set_limit(self, minutes: int) -> None:
        self.slurm.asked("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")


def _processes() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if "python" in command.split(" ")[0]:
                yield int(entry.name), command


def slow_recipe(job: Job) -> Job:
    """Enough steps to be caught in the middle of them, in few seconds."""
    job.recipe["train"]["steps"] = 300
    job.recipe["checkpoint"] = {"every_steps": 50, "keep": 2}
    job.recipe["evaluate"]["every_steps"] = 100
    job.write()
    return job


def result(report: dict) -> dict:
    """What must not depend on how often a run was interrupted, to the bit."""
    names = ("curve", "evaluations", "sweet_spot", "answers", "resume_exact")
    adapter = report["adapter"]["files"]["adapter_model.safetensors"]
    return {name: report[name] for name in names} | {"adapter": adapter}
