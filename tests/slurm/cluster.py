"""A real Slurm as a user meets it: submit, look, wait, cancel; and what an administrator does to nodes and limits."""

import json
import os
import re
import shutil
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
STEPS, FROZEN_STEP = 60, 25


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
        scratch = folder / "scratch"
        scratch.mkdir()
        # Numbers of jobs are those of other clusters on this machine as well: in /tmp they would share folders.
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "QLORA_SCRATCH": str(scratch)}

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
        """Numbers of jobs; an array has one, for scancel does not understand how squeue lists its tasks."""
        return self.asked("squeue", "--noheader", "--format=%F").split()

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

    def until_frozen(self) -> int:
        """The job has stopped itself (see `frozen_once`): its process."""
        return until(self._frozen, self.log)

    def _frozen(self) -> int | None:
        found = (pid for pid, command in _stopped() if "entrypoint.py" in command and str(self.cwd) in command)
        return next(found, None)

    def until_ended(self) -> dict[str, str]:
        """The final state: no longer waiting, running or ending."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "SIGNALING")
        until(lambda: self.about()["JobState"] not in going, lambda: f"{self.about()}\n{self.log()}")
        return self.about()

    def exit_code(self) -> int:
        return int(self.about()["ExitCode"].split(":")[0])

    def restarts(self) -> int:
        return int(self.about()["Restarts"])

    def set_limit(self, minutes: int) -> None:
        self.slurm.asked("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")

    def minutes(self) -> int:
        """How long it runs by now."""
        hours, minutes, _seconds = self.about()["RunTime"].split(":")
        return int(hours) * 60 + int(minutes)


def _stopped() -> Iterator[tuple[int, str]]:
    """Processes that SIGSTOP has stopped, and their commands."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(") ")[2][0]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if state == "T":
                yield int(entry.name), command


def python_that_runs(folder: Path, script: str) -> str:
    """A virtual environment whose Python is a script: for QLORA_VENV."""
    path = folder / "venv" / "bin" / "python"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return str(folder / "venv")


def frozen_once(folder: Path) -> dict[str, str]:
    """Lets a job (of an array the first task) stop itself in the middle of its first start, as long as nobody wakes it.

    So what is done to it comes in time, on any machine.
    """
    first = "[[ -z ${SLURM_RESTART_COUNT:-} && ${SLURM_ARRAY_TASK_ID:-1} == 1 ]]"
    point = f"export JOB_CRASH_AT=step.after_update:{FROZEN_STEP}=freeze"
    return {"QLORA_VENV": python_that_runs(folder, f'{first} && {point}\nexec {sys.executable} "$@"')}


def staged_recipe(job: Job) -> Job:
    """Checkpoints and evaluations before and after the step at which it is frozen."""
    job.recipe["train"]["steps"] = STEPS
    job.recipe["checkpoint"] = {"every_steps": 10, "keep": 2}
    job.recipe["evaluate"]["every_steps"] = 20
    job.write()
    return job


def result(report: dict) -> dict:
    """What must not depend on how often a run was interrupted, to the bit."""
    names = ("curve", "evaluations", "sweet_spot", "answers", "resume_exact")
    adapter = report["adapter"]["files"]["adapter_model.safetensors"]
    return {name: report[name] for name in names} | {"adapter": adapter}
