"""The commands that train.sbatch would run, word by word; and that they fit the image and the other scripts."""

import os
import re
import shlex
import subprocess

import pytest
from stand_ins import PATIENCE_SECONDS, ROOT, TRAIN

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
def dry(tmp_path):
    """The words of the command, from a folder that a user submits from."""
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("output: s3://models/notes\n")
    environment = {"PATH": os.environ["PATH"], "HOME": "/home/me", "SLURM_CPUS_PER_TASK": "8", "TMPDIR": "/local"}
    environment |= SECRETS | {"AWS_ACCESS_KEY_ID": "AKIA", "HF_HOME": "/gpfs/hf", "https_proxy": "http://proxy:3128"}
    environment |= {"PYTHONPATH": "/gpfs/old", "SECRET": "none of the job's"}

    def words(runtime, *arguments, **extra):
        done = subprocess.run(
            ["bash", TRAIN, "--dry-run", "recipe.yaml", *arguments],
            cwd=folder,
            env=environment | {"QLORA_RUNTIME": runtime} | extra,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return folder, shlex.split(done.stdout)

    return words


def test_in_a_virtual_environment(dry):
    folder, words = dry("venv", "--set", "lora.r=16")

    program = [str(ROOT / ".venv/bin/python"), str(ROOT / "entrypoint.py")]
    assert words == [*SRUN, *program, "run", f"{folder}/recipe.yaml", "--set", "lora.r=16"]


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
def test_no_secret_stands_on_a_command_line(dry, runtime):
    _folder, words = dry(runtime, QLORA_IMAGE="x")

    assert not [word for word in words for secret in SECRETS.values() if secret in word]


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


def test_a_dry_run_can_be_asked_for_by_variable_and_leaves_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{}")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "QLORA_DRY_RUN": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", TRAIN, "recipe.yaml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )

    assert done.stdout.startswith("srun --nodes=1")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


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
