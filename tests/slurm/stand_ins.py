"""The batch scripts without a Slurm: its commands are stand-ins that answer as a real one was seen to, and write down
what they were asked; so is the job.
"""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "slurm" / "train.sbatch"
PATIENCE_SECONDS = 900
"""Longest that anything here may take; no test depends on how fast it is."""

SRUN = """#!/bin/bash
# A task on each node, here each on the same one: in a session of its own, as on another machine, and with its number.
echo "srun $*" >> "$DESK/calls"
while [[ $1 == --* ]]; do
  case $1 in --nodes=*) nodes=${1#*=} ;; esac
  shift
done
((nodes > 1)) || exec "$@"
[[ $1 != mkdir || ! -e $DESK/refuse-mkdir ]] || exit 1
tasks=() highest=0
trap 'for task in "${tasks[@]}"; do kill -USR2 "$task"; done' USR2
for ((n = 0; n < nodes; n++)); do
  SLURM_NODEID=$n setsid "$@" &
  tasks+=($!)
done
for task in "${tasks[@]}"; do
  # A signal ends the first wait; one that has ended already is waited for all the same, for its code.
  wait "$task"; code=$?
  while kill -0 "$task" 2> /dev/null; do wait "$task"; code=$?; done
  ((code <= highest)) || highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show job") cat "$DESK/job" ;;
  "show config")
    while [[ -e $DESK/slow ]]; do touch "$DESK/preparing"; sleep 0.05; done
    echo "KillWait                = 30 sec" ;;
  "show partition") echo "PartitionName=gpu GraceTime=90 PreemptMode=REQUEUE" ;;
  "show hostnames") tr , '\\n' <<< "$3" ;;
  "requeue "*)
    echo "scontrol $*" >> "$DESK/calls"
    [[ ! -e $DESK/refuse-requeue ]] || exit 1
    # Slurm ends the script at once: TERM to it and to whatever it has started.
    ( trap '' TERM; for _ in {1..20}; do kill -TERM 0; sleep 0.02; done ) > /dev/null 2>&1 & ;;
  *) printf 'scontrol' >> "$DESK/calls"; printf ' %s' "$@" >> "$DESK/calls"; echo >> "$DESK/calls"
     [[ ! -e $DESK/refuse-$1 ]] ;;
esac
"""
SINFO = """#!/bin/bash
cat "$DESK/nodes"
"""
SQUEUE = """#!/bin/bash
echo "squeue $*" >> "$DESK/calls"
[[ ! -e $DESK/refuse-squeue ]] && cat "$DESK/queue"
"""
APPTAINER = """#!/bin/bash
printf '%s\\n' "$@" > "$DESK/arguments"
env > "$DESK/environment"
source "$DESK/behaviour"
"""
SBATCH = """#!/bin/bash
printf 'sbatch' >> "$DESK/calls"; printf '|%s' "$@" >> "$DESK/calls"; echo >> "$DESK/calls"
env > "$DESK/submitted-with"
[[ ! -e $DESK/refuse-sbatch ]] && echo 12
"""
JOB = """#!/bin/bash
env > "$DESK/environment${JOB_NODE_RANK:-}"
printf '%s\\n' "$@" > "$DESK/arguments"
if [[ -e $DESK/outcome.json ]]; then cp "$DESK/outcome.json" "$JOB_OUTCOME_FILE"; fi
source "$DESK/behaviour"
"""

LOOKS_OFTEN = '() { [[ $* != "-r -t 1 -u "* ]] || set -- -r -t 0.05 "${@:4}"; builtin read "$@"; }'
"""bash's `read` for the scripts: where they look once a second whether the job goes on, they look twenty times."""

RUNNING = "JobState=RUNNING Reason=None Restarts={restarts} TimeLimit=08:00:00 StartTime=2025-01-31T10:00:00 EndTime=2025-01-31T18:00:00 PreemptTime=None ExcNodeList={excluded}"  # noqa: E501
"""What a real `scontrol show job --oneliner` shows of a job that ended by itself, as far as the script reads it."""
CANCELLED = "JobState=COMPLETING Reason=None Restarts={restarts} TimeLimit=08:00:00 StartTime=2025-01-31T10:00:00 EndTime=2025-01-31T11:00:00 PreemptTime=None ExcNodeList={excluded}"  # noqa: E501
QUEUED_AGAIN = "JobState=COMPLETING Reason=None Restarts={more} TimeLimit=UNLIMITED StartTime=2025-01-31T10:00:00 EndTime=Unknown PreemptTime=None ExcNodeList={excluded}"  # noqa: E501
PREEMPTED = "JobState=COMPLETING Reason=None Restarts={restarts} TimeLimit=08:00:00 StartTime=2025-01-31T10:00:00 EndTime=2025-01-31T11:00:00 PreemptTime=2025-01-31T11:00:00 ExcNodeList={excluded}"  # noqa: E501
CANCELLED_IN_GRACE = "JobState=COMPLETING Reason=None Restarts={restarts} TimeLimit=08:00:00 StartTime=2025-01-31T10:00:00 EndTime=2025-01-31T11:00:20 PreemptTime=2025-01-31T11:00:00 ExcNodeList={excluded}"  # noqa: E501
TIME_OUT = "JobState=COMPLETING Reason=TimeLimit Restarts={restarts} TimeLimit=1-08:00:00 StartTime=2025-01-31T10:00:00 EndTime=2025-02-01T18:00:21 PreemptTime=None ExcNodeList={excluded}"  # noqa: E501
NOBODY_ANSWERS = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A start of the batch script that has ended."""

    code: int
    said: str
    calls: list[str]
    """What Slurm was told to do, in order; questions are left out."""

    @property
    def requeued(self) -> list[str]:
        return [call.split(" ")[-1] for call in self.calls if call.startswith("scontrol requeue")]

    @property
    def comments(self) -> list[str]:
        return [call.split("Comment=", 1)[1] for call in self.calls if "Comment=" in call]


class Desk:
    """A folder that a job is submitted from, and the stand-ins on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begun: list[subprocess.Popen] = []
        (folder / "bin").mkdir()
        (folder / "venv" / "bin").mkdir(parents=True)
        (folder / "scratch").mkdir()
        commands = {"srun": SRUN, "scontrol": SCONTROL, "sinfo": SINFO, "squeue": SQUEUE, "sbatch": SBATCH}
        commands["apptainer"] = APPTAINER
        for name, text in commands.items():
            _executable(folder / "bin" / name, text)
        (folder / "queue").write_text("")
        (folder / "calls").write_text("")
        _executable(folder / "venv" / "bin" / "python", JOB)
        (folder / "recipe.yaml").write_text("output: s3://models/notes\n")
        self.nodes("n1", "n2")
        self.behave("exit 0")

    def nodes(self, *names: str) -> None:
        (self.folder / "nodes").write_text("".join(f"{name}\n" for name in names))

    def behave(self, script: str, *, outcome: Mapping[str, object] | str | None = None) -> None:
        """What the job does, as bash, and what its outcome file says."""
        (self.folder / "behaviour").write_text(script)
        if outcome is not None:
            text = outcome if isinstance(outcome, str) else json.dumps(outcome)
            (self.folder / "outcome.json").write_text(text)

    def refuse(self, command: str) -> None:
        """Slurm says no to this command of scontrol."""
        (self.folder / f"refuse-{command}").touch()

    def environment(self, *, job: str, restarts: int, excluded: str, extra: Mapping[str, str]) -> dict[str, str]:
        (self.folder / "job").write_text(job.format(restarts=restarts, more=restarts + 1, excluded=excluded))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JOB_", "SLURM_", "QLORA_", "AWS_", "HF_"))}
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "qlora-job", "SLURM_JOB_PARTITION": "gpu"}
        slurm |= {"SLURMD_NODENAME": "n1"} | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})
        ours = {"QLORA_VENV": str(self.folder / "venv"), "QLORA_SCRATCH": str(self.folder / "scratch")}
        ours |= {"DESK": str(self.folder), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        ours |= {"QLORA_HOME": str(ROOT), "BASH_FUNC_read%%": LOOKS_OFTEN}
        return kept | slurm | ours | dict(extra)

    def start(self, *words: str, job: str = RUNNING, restarts: int = 0, excluded: str = "(null)", **extra: str) -> Done:
        """Run train.sbatch as Slurm does; `job` is what Slurm shows of it when it has ended."""
        (self.folder / "calls").write_text("")
        done = subprocess.run(
            ["bash", TRAIN, "recipe.yaml", *words],
            cwd=self.folder,
            env=self.environment(job=job, restarts=restarts, excluded=excluded, extra=extra),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
            start_new_session=True,
        )
        return Done(code=done.returncode, said=done.stdout + done.stderr, calls=self.calls())

    def begin(self, *words: str, job: str = RUNNING, **extra: str) -> subprocess.Popen:
        """As `start`, and go on while it runs."""
        (self.folder / "calls").write_text("")
        environment = self.environment(job=job, restarts=0, excluded="(null)", extra=extra)
        command = ["bash", TRAIN, "recipe.yaml", *words]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        child = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, **quiet)
        self._begun.append(child)
        return child

    def clear(self) -> None:
        """End what was begun and all that it has started."""
        for child in self._begun:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def submitter(self, script: str, *words: str, **extra: str) -> Done:
        """Run nightly.sh or sweep.sh as a person or cron does; the calls are those to sbatch, word by word."""
        (self.folder / "calls").write_text("")
        environment = self.environment(job=RUNNING, restarts=0, excluded="(null)", extra={})
        environment = {k: v for k, v in environment.items() if not k.startswith("SLURM") and k != "QLORA_HOME"} | extra
        done = subprocess.run(
            [ROOT / "slurm" / script, *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        calls = (self.folder / "calls").read_text().splitlines()
        return Done(
            code=done.returncode,
            said=done.stdout + done.stderr,
            calls=[line.removeprefix("sbatch|") for line in calls if line.startswith("sbatch|")],
        )

    def calls(self) -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.startswith("scontrol")]

    def seen(self, node: int | None = None) -> dict[str, str]:
        """The environment that the job had; of several nodes that of one."""
        lines = (self.folder / f"environment{'' if node is None else node}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


def bash(script: str, *arguments: str, cwd: Path = ROOT) -> str:
    """What functions of train.sbatch print."""
    done = subprocess.run(
        ["bash", "-c", f"source slurm/train.sbatch\n{script}", "bash", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    return done.stdout


def _executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
