"""Every command of slurm/README.md, and of README.md for Slurm, as it is typed: on stand-ins and on a real Slurm."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import until
from stand_ins import PATIENCE_SECONDS, ROOT, Desk
from typed_commands import blocks, within_sentences

from job.cli import cli
from job.edge.host.interrupt import Interrupt
from job.ending import Session

PAGE = (ROOT / "slurm" / "README.md").read_text(encoding="utf-8")
SWEEP, CRONTAB = ([block for block in blocks(PAGE) if block.startswith(start)] for start in ("# sweep", "QLORA_ENV"))
TYPED = [block for block in blocks(PAGE) if block not in [*SWEEP, *CRONTAB]]
WITHIN = [
    *within_sentences(PAGE, "sbatch ", "scancel ", "squeue ", "slurm/sweep.sh ", "python entrypoint.py "),
    *(f"python entrypoint.py {each}" for each in within_sentences(PAGE, "report ")),
    *within_sentences((ROOT / "README.md").read_text(encoding="utf-8"), "sbatch "),
]
WITHIN.remove("python entrypoint.py check")  # in a sentence about it
SUBMITS = {r"(?m)(?:^|\s)sbatch (?=[-s])": 1, r"slurm/nightly\.sh (?=[-r])": 1, r"slurm/sweep\.sh (?!--table)": 2}
"""Jobs by command: sweep.sh submits its array and its table."""
SHELLCHECK = Path(sys.executable).with_name("shellcheck")

SBATCH = """#!/bin/bash
# As the real one reads its command line: options, a script with a header, what the script gets.
echo "$@" > "$DESK/asked"
while [[ ${1:-} == --*=* || ${1:-} == --parsable ]]; do shift; done
bash -n "$1" && grep -q '^#SBATCH' "$1" || { echo "sbatch: error: no batch script: $1" >&2; exit 1; }
for word in "${@:2}"; do
  [[ $word != *.yaml && $word != *.txt || -r $word ]] || { echo "$word: not there" >&2; exit 1; }
done
cat "$DESK/asked" >> "$DESK/submitted"
echo 12
"""
HELD = """#!/bin/bash
exec {sbatch} --hold "$@"
"""
SCANCEL = """#!/bin/bash
[[ ${@: -1} == 12 ]]
"""
PYTHON = """#!/bin/bash
[[ $1 != -m ]] || exec {python} "$@"
printf '%s\\n' "${{@:2}}" > "$DESK/python"
case $2 in
  fetch) mkdir -p "$5" && cp "$3" "$5/recipe.yaml" ;;
esac
"""
CONTAINERS = """#!/bin/bash
# `apptainer build FILE SOURCE` and `enroot import -o FILE SOURCE`
[[ $1 != import ]] || set -- build "${@:3}"
[[ $1 != build ]] || { [[ $3 == docker* ]] && touch "$2"; }
"""


@dataclass(slots=True)
class Prompt:
    """A shell in a checkout of one's own, which has the files that the page speaks of."""

    desk: Desk
    home: Path
    job: str = "12"

    def type(self, text: str, *, shell: str = "bash", stdin: str = "", **environment: str):
        places = {"/shared/me": self.home / "shared", "/home/me": self.home}
        names = {"RECIPE": "recipe.yaml", "RUN_URI": "s3://b/runs/x", "URI URI ...": "s3://b/runs/x s3://b/runs/y"}
        for shown, meant in {**places, **names, "JOBID": self.job, "FOLDER": "sweep-1"}.items():
            text = text.replace(shown, str(meant))
        path = f"{self.desk.folder / 'bin'}:{os.environ['PATH']}"
        ours = {"DESK": str(self.desk.folder), "HOME": str(self.home), "PATH": path, "TMPDIR": str(self.home)}
        done = subprocess.run(
            [shell, "-e", "-c", text],
            cwd=self.desk.folder,
            env=ours | {"QLORA_VENV": str(self.desk.folder / "venv")} | environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        return done

    @property
    def submitted(self) -> list[str]:
        path = self.desk.folder / "submitted"
        return path.read_text().splitlines() if path.exists() else []


def jobs_of(text):
    """How many jobs what is typed hands to Slurm."""
    return sum(jobs * len(re.findall(start, text)) for start, jobs in SUBMITS.items())


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def prompt(tmp_path):
    desk = Desk(tmp_path)
    desk.behave('[[ "$2 $3" != "report recipe.yaml" ]] || exit 66')  # for nightly.sh: the run is not finished
    for name in ("slurm", "recipes", "entrypoint.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "locks").mkdir()
    for lock in (ROOT / "locks").iterdir():
        (tmp_path / "locks" / lock.name).touch()  # what is in it, the image's tests install
    (tmp_path / "sweep.txt").write_text(SWEEP[0])
    (tmp_path / "sweep-1" / "task-1").mkdir(parents=True)
    (tmp_path / "sweep-1" / "sweep.txt").write_text("--set lora.r=8\n")
    (tmp_path / "sweep-1" / "task-1" / "outcome.json").write_text('{"run_uri": "s3://b/runs/x"}')
    for name in ("python", "python3.12"):
        program(tmp_path / "bin" / name, PYTHON.format(python=sys.executable))
    for name in ("apptainer", "enroot"):
        program(tmp_path / "bin" / name, CONTAINERS)
    program(tmp_path / "bin" / "scancel", SCANCEL)
    program(tmp_path / "bin" / "sbatch", SBATCH)
    home = tmp_path / "home"
    home.mkdir()
    (home / "qlora-job").symlink_to(tmp_path)
    return Prompt(desk, home)


@pytest.fixture
def prompt_of_the_cluster(prompt, real_slurm):
    """With Slurm's own commands. What is submitted is held: only that it was taken is looked at."""
    for name in ("srun", "scontrol", "sinfo", "squeue", "scancel", "sbatch"):
        (prompt.desk.folder / "bin" / name).unlink()
    program(prompt.desk.folder / "bin" / "sbatch", HELD.format(sbatch=shutil.which("sbatch")))
    return prompt


def test_there_are_commands():
    assert (len(SWEEP), len(CRONTAB)) == (1, 1)
    assert len(TYPED) >= 7
    assert len(WITHIN) >= 12


@pytest.mark.parametrize("text", [*TYPED, *WITHIN])
def test_it_can_be_typed_as_it_stands(prompt, text):
    prompt.type(text)

    assert len(prompt.submitted) == jobs_of(text)


@pytest.mark.parametrize("text", [each for each in [*TYPED, *WITHIN] if "entrypoint.py" in each])
def test_the_job_understands_its_command_line(prompt, text):
    prompt.type(text)
    name, *words = (prompt.desk.folder / "python").read_text().splitlines()

    cli.commands[name].make_context(name, words, obj=Session(interrupt=Interrupt()))


def test_the_file_with_the_keys_is_for_its_owner_and_is_read(prompt):
    (block,) = [block for block in TYPED if "umask" in block]
    prompt.type(block, stdin="AWS_ACCESS_KEY_ID=AKIA\n")
    (variable,) = re.findall(r"export (\S+)", block)
    shown = prompt.type(f"export {variable}; bash slurm/train.sbatch --dry-run recipe.yaml").stdout

    assert (prompt.home / ".qlora-job.env").stat().st_mode & 0o777 == 0o600
    assert "AWS_ACCESS_KEY_ID (yours)" in shown


@pytest.mark.parametrize("block", [block for block in TYPED if "QLORA_RUNTIME=" in block])
def test_the_image_that_is_made_is_the_one_that_the_job_takes(prompt, block):
    shown = prompt.type(f"{block}\nbash slurm/train.sbatch --dry-run recipe.yaml").stdout
    (image,) = prompt.desk.folder.glob("qlora-job.s*")

    assert str(image) in shown


def test_a_crontab_s_lines_do_what_cron_does_with_them(prompt):
    """It puts variables in as they stand, reads five fields and gives the rest to sh, in the user's home."""
    variable, line = CRONTAB[0].splitlines()
    name, value = variable.split("=")
    file = Path(value.replace("/home/me", str(prompt.home)))
    file.touch()
    assert not re.search(r"[$~]", value)
    command = re.fullmatch(r"(?:[\d*]+ ){5}([^%]+)", line)[1]  # to cron, % ends a line
    prompt.type(f"cd; {command}", shell="sh", **{name: str(file)})

    (call,) = prompt.submitted
    assert "--partition=gpu" in call
    assert (prompt.desk.folder / "nightly.log").read_text().endswith("submitted as job 12\n")


def test_a_sweep_has_a_task_for_each_line_that_is_shown(prompt):
    (by_hand,) = [each for each in WITHIN if "--array" in each]
    tasks = len([line for line in SWEEP[0].splitlines() if line.startswith("--set")])
    prompt.type("slurm/sweep.sh recipe.yaml sweep.txt")

    assert f"--array=1-{tasks}%" in by_hand
    assert f"--array=1-{tasks}%" in prompt.submitted[0]


@pytest.mark.parametrize(
    "text",
    [
        "sbatch slurm/train.sbat recipe.yaml",
        "sbatch slurm/train.sbatch recipes.yaml",
        "slurm/night.sh recipe.yaml",
        "apptainer build qlora-job.sif",
        "scancel",
    ],
)
def test_a_mistake_in_a_command_is_seen(prompt, text):
    with pytest.raises(AssertionError):
        prompt.type(text)


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="NO SHELLCHECK in this environment")
@pytest.mark.parametrize("text", TYPED)
def test_shellcheck_finds_nothing_in_what_is_typed(text):
    command = [SHELLCHECK, "--shell=bash", "--severity=warning", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout


@pytest.mark.slurm
@pytest.mark.slurm_short
def test_a_real_slurm_takes_every_line(prompt_of_the_cluster, real_slurm):
    prompt = prompt_of_the_cluster
    running = real_slurm.submit(prompt.desk.folder, "--output=/dev/null", "--wrap=trap '' USR2; sleep 86400")
    prompt.job = running.number
    until(lambda: running.about()["JobState"] == "RUNNING", running.about)
    for text in sorted([*TYPED, *WITHIN], key="scancel JOBID".__eq__):
        expected = len(real_slurm.queued()) + jobs_of(text)
        prompt.type(text, **real_slurm.environment)
        assert text.startswith("scancel ") or len(real_slurm.queued()) == expected, text
    running.until_ended()
