"""What train.sbatch --dry-run shows, the command word by word, and what it checks; and that the scripts fit each other
and the image."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from job_process import Job
from stand_ins import PATIENCE_SECONDS, ROOT, TRAIN, Desk, bash

from job.cli import cli

SRUN = ["srun", "--nodes=1", "--ntasks=1", "--cpus-per-task=8", "--input=none", "--kill-on-bad-exit=1", "--export=ALL"]
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    "HF_TOKEN": "hf_abc",
    "WANDB_API_KEY": "w b",
    "JOB_SET": "a.b=1\nc.d=2",
}
PASSED = [
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "JOB_DEADLINE", "JOB_DEVICE", "JOB_GRACE_SECONDS"),
    *("JOB_OUTCOME_FILE", "JOB_SET", "JOB_WORKDIR", "OMP_NUM_THREADS", "WANDB_API_KEY", "https_proxy"),
]


@pytest.fixture
def desk(tmp_path):
    (tmp_path / "desk").mkdir()
    return Desk(tmp_path / "desk")


@pytest.fixture
def rehearsal(tmp_path, desk):
    """A dry run from a folder that a user submits from; the job's check is a stand-in."""
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("output: s3://models/notes\n")
    environment = {"PATH": f"{desk.folder}/bin:{os.environ['PATH']}", "HOME": "/home/me", "DESK": str(desk.folder)}
    environment |= {"QLORA_SCRATCH": "/local", "QLORA_VENV": f"{desk.folder}/venv"}
    environment |= SECRETS | {"AWS_ACCESS_KEY_ID": "AKIA", "HF_HOME": "/gpfs/hf", "https_proxy": "http://proxy:3128"}
    environment |= {"PYTHONPATH": "/gpfs/old", "SECRET": "none of the job's"}

    def rehearse(*arguments, recipe="recipe.yaml", **extra):
        return subprocess.run(
            ["bash", TRAIN, "--dry-run", recipe, *arguments],
            cwd=folder,
            env=environment | extra,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    return rehearse


@pytest.fixture
def dry(tmp_path, rehearsal):
    """The words of the command."""

    def words(runtime, *arguments, **extra):
        done = rehearsal(*arguments, QLORA_RUNTIME=runtime, **extra)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("srun ")]
        return tmp_path / "my project", shlex.split(line)

    return words


def test_in_a_virtual_environment(dry):
    folder, words = dry("venv", "--set", "lora.r=16")

    program = [f"{folder.parent}/desk/venv/bin/python", str(ROOT / "entrypoint.py")]
    assert words == [*SRUN, *program, "run", f"{folder}/recipe.yaml", "--set", "lora.r=16"]


def test_the_virtual_environment_is_that_of_the_checkout():
    script = "QLORA_VENV= QLORA_RUNTIME=venv home=/here; build_command report r.yaml; echo ${program[@]}"

    assert bash(script).split() == ["/here/.venv/bin/python", "/here/entrypoint.py", "report", "r.yaml"]


def test_under_apptainer(dry):
    folder, words = dry("apptainer", "--set", "evaluate.prompts=['a b']", QLORA_IMAGE="/images/qlora-job.sif")

    assert words == [
        *SRUN,
        *("apptainer", "exec", "--nv", "--cleanenv"),
        *("--home", "/local/qlora-job-JOBID:/work", "--bind", f"{folder}:{folder}", "--pwd", str(folder)),
        *("/images/qlora-job.sif", "/opt/venv/bin/python", "/app/entrypoint.py"),
        *("run", f"{folder}/recipe.yaml", "--set", "evaluate.prompts=['a b']"),
    ]


def test_under_pyxis(dry):
    folder, words = dry("pyxis", QLORA_IMAGE="registry.example#team/qlora-job:1")

    assert words == [
        *SRUN,
        "--container-image=registry.example#team/qlora-job:1",
        f"--container-mounts=/local/qlora-job-JOBID:/work,{folder}:{folder}",
        "--no-container-mount-home",
        f"--container-workdir={folder}",
        f"--container-env={','.join(PASSED)}",
        *("/opt/venv/bin/python", "/app/entrypoint.py", "run", f"{folder}/recipe.yaml"),
    ]


@pytest.mark.parametrize("runtime", ["venv", "apptainer", "pyxis"])
def test_no_secret_stands_on_a_command_line_or_is_shown(rehearsal, runtime):
    done = rehearsal(QLORA_RUNTIME=runtime, QLORA_IMAGE="x")
    shown = done.stdout + done.stderr

    assert "HF_TOKEN (yours)" in shown
    assert not [secret for value in SECRETS.values() for secret in value.splitlines() if secret in shown]


def test_folders_that_the_job_needs_besides_are_seen_in_the_container_once(dry):
    folder, words = dry("apptainer", QLORA_IMAGE="x", QLORA_BIND="/data/models,/data/sets", JOB_WORKDIR="/gpfs/work")

    binds = ["/gpfs/work", "/data/models", "/data/sets"]
    assert words[words.index("--bind") + 1] == ",".join(f"{f}:{f}" for f in [folder, *binds])


def test_apptainer_gets_the_job_s_variables_by_its_own_prefix(tmp_path):
    """--cleanenv drops everything else: the host's Python and its caches are none of the container's."""
    script = "scratch=/s state=/p recipe=/p/r.yaml QLORA_RUNTIME=apptainer QLORA_IMAGE=x; settle_environment; env"
    done = subprocess.run(
        ["bash", "-c", f"source {shlex.quote(str(TRAIN))}; {script}"],
        env={"PATH": os.environ["PATH"], "HOME": "/home/me", "HF_HOME": "/gpfs/hf", "HF_TOKEN": "hf_abc"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    passed = dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("APPTAINERENV_"))

    assert passed == {
        "APPTAINERENV_HF_TOKEN": "hf_abc",
        "APPTAINERENV_JOB_DEVICE": "cuda",
        "APPTAINERENV_JOB_OUTCOME_FILE": "/work/outcome.json",
        "APPTAINERENV_JOB_WORKDIR": "/work",
        "APPTAINERENV_OMP_NUM_THREADS": "1",
    }


def test_a_dry_run_can_be_asked_for_by_variable_and_leaves_nothing(tmp_path, desk):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("{}")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "QLORA_DRY_RUN": "1", "DESK": str(desk.folder)}
    done = subprocess.run(
        ["bash", TRAIN, "recipe.yaml"],
        cwd=tmp_path / "mine",
        env=environment | {"TMPDIR": str(tmp_path / "mine"), "QLORA_VENV": f"{desk.folder}/venv"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )

    assert "\nsrun --nodes=1" in done.stdout
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["recipe.yaml"]


# --- what else is shown, and the check -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 64, 65, 69, 77])
def test_the_check_s_exit_code_is_that_of_the_dry_run(rehearsal, desk, code):
    desk.behave(f"echo 'ok  recipe'; exit {code}")
    done = rehearsal("--set", "lora.r=8")

    assert done.returncode == code
    assert done.stdout.endswith("# the check\nok  recipe\n")
    asked = (desk.folder / "arguments").read_text().splitlines()
    assert asked == [f"{ROOT}/entrypoint.py", "check", "recipe.yaml", "--set", "lora.r=8"]


def test_what_fails_in_a_dry_run_within_a_job_is_not_started_again(desk):
    desk.behave("exit 69")
    done = desk.start(QLORA_DRY_RUN="1")

    assert (done.code, done.calls) == (69, [])


def options_of(command):
    return {name for each in cli.commands[command].params for name in each.opts if name.startswith("--")}


def test_the_check_gets_all_that_it_knows_of_the_arguments_of_run(rehearsal, desk):
    """Whatever only `run` knows would be refused by `check` as a mistake in the command line."""
    only_run = sorted(options_of("run") - options_of("check") - {"--crash-at"})
    flags = {name for each in cli.commands["run"].params for name in each.opts if getattr(each, "is_flag", False)}
    kept = ["--set", "lora.r=8", "--output=s3://x/y"]
    arguments = [word for name in only_run for word in ([name] if name in flags else [name, "1", f"{name}=1"])]
    assert rehearsal(*arguments, *kept).returncode == 0

    assert (desk.folder / "arguments").read_text().splitlines()[2:] == ["recipe.yaml", *kept]


def test_what_sbatch_reads_is_shown(rehearsal):
    lines = [line for line in rehearsal().stdout.splitlines() if line.startswith("#SBATCH")]

    assert lines == [line for line in header("train.sbatch") if not line.startswith("##")]


def test_the_environment_that_the_job_has_is_shown(rehearsal, desk):
    """All that the scripts set, with its value, as a job that runs finds it."""
    shown = rehearsal().stdout.split("# the environment of the job\n")[1].split("# the command")[0].splitlines()
    desk.start(SLURM_CPUS_PER_TASK="8", OMP_NUM_THREADS="")
    found = desk.seen()
    values = dict(line.split("=", 1) for line in shown if "=" in line)

    assert values["OMP_NUM_THREADS"] == found["OMP_NUM_THREADS"] == "8"
    assert values["JOB_DEVICE"] == found["JOB_DEVICE"] == "cuda"
    there = f"{desk.folder}/scratch/qlora-job-7"
    places = {name: value for name, value in found.items() if value.startswith(there)}
    assert {name: value.replace(there, "/local/qlora-job-JOBID") for name, value in places.items()}.items() <= (
        values.items()
    )
    assert {line.split(" ")[0] for line in shown if "=" not in line} == {
        *SECRETS,
        *("AWS_ACCESS_KEY_ID", "https_proxy", "JOB_DEADLINE", "JOB_GRACE_SECONDS"),
    }


@pytest.mark.parametrize(
    ("runtime", "extra", "told"),
    [
        ("pyxis", {}, "not checked: only a job can start containers of Pyxis"),
        ("apptainer", {"PATH": "/usr/bin:/bin"}, "not checked: apptainer is not on this machine"),
    ],
)
def test_where_nothing_can_be_checked_it_says_so(rehearsal, desk, runtime, extra, told):
    done = rehearsal(QLORA_RUNTIME=runtime, QLORA_IMAGE="x", **extra)

    assert told in done.stderr
    assert not (desk.folder / "arguments").exists()


def test_a_container_is_checked_in_the_container(rehearsal, desk):
    desk.behave("exit 65")
    done = rehearsal(QLORA_RUNTIME="apptainer", QLORA_IMAGE="/images/qlora-job.sif")

    assert done.returncode == 65
    arguments = (desk.folder / "arguments").read_text().splitlines()
    assert arguments[-5:] == [
        *("/images/qlora-job.sif", "/opt/venv/bin/python", "/app/entrypoint.py"),
        *("check", "recipe.yaml"),
    ]


def test_the_real_check_needs_no_gpu_and_refuses_wrong_data(tmp_path, tiny_base, rehearsal):
    job = Job(tmp_path, tiny_base)
    job.write()
    venv = {"QLORA_VENV": sys.prefix, "HOME": str(tmp_path)}
    right = rehearsal("--output", f"file://{tmp_path}/out", **venv, recipe=str(job.recipe_path), JOB_SET="")
    (job.data / "train.jsonl").write_text('{"question": "1"}\n')
    wrong = rehearsal(**venv, recipe=str(job.recipe_path), JOB_SET="")

    assert right.returncode == 0, right.stdout + right.stderr
    assert "ok  data" in right.stdout
    assert wrong.returncode == 65, wrong.stdout + wrong.stderr
    assert "train.jsonl:1" in wrong.stdout
    assert not job.store.exists() or not list(job.store.rglob("run.json"))


# --- the scripts fit each other and the image ------------------------------------------------------------------------


def header(name):
    lines = (ROOT / "slurm" / name).read_text().splitlines()
    return [line for line in lines if line.startswith(("#SBATCH", "##SBATCH"))]


def test_a_sweep_s_task_asks_slurm_for_what_a_run_asks_for():
    own = ("--job-name", "--output")
    train, sweep = ([x for x in header(n) if not any(o in x for o in own)] for n in ("train.sbatch", "sweep.sbatch"))

    assert train == sweep
    assert len(header("train.sbatch")) == len(header("sweep.sbatch")) == len(train) + 2


@pytest.mark.parametrize("option", ["--requeue", "--open-mode=append", "--signal=B:USR2@300"])
def test_what_stopping_and_starting_again_rests_on_is_asked_for(option):
    assert f"#SBATCH {option}" in header("train.sbatch")


def test_partition_and_account_are_the_user_s():
    assert [line for line in header("train.sbatch") if line.startswith("##")] == [
        "##SBATCH --partition=gpu",
        "##SBATCH --account=project",
    ]


def test_the_program_and_the_work_folder_are_where_the_image_has_them():
    image = (ROOT / "Dockerfile").read_text()
    script = TRAIN.read_text()
    program = re.search(r"^image_program=\((.*)\)$", script, re.MULTILINE)[1].split()
    work = re.search(r"^image_work=(.*)$", script, re.MULTILINE)[1]
    entry = re.findall(r'"([^"]+)"', re.search(r"^ENTRYPOINT \[(.*)\]$", image, re.MULTILINE)[1])

    assert entry[-2:] == program
    assert re.search(rf"^\s+HOME={work} ", image, re.MULTILINE)
    assert re.search(rf"^\s+JOB_WORKDIR={work} ", image, re.MULTILINE)


def test_each_variable_of_the_scripts_is_explained_in_the_readme_and_none_other():
    scripts = "".join(path.read_text() for path in (ROOT / "slurm").iterdir() if path.suffix in {".sbatch", ".sh"})
    used = set(re.findall(r"QLORA_[A-Z_]+", scripts)) - {"QLORA_SWEEP_FOLDER"}  # of sweep.sh for its tasks

    assert used == set(re.findall(r"QLORA_[A-Z_]+", (ROOT / "slurm" / "README.md").read_text()))
