"""What the Dockerfile claims, held without building it."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest
from docker.utils import exclude_paths

from job.cli import cli

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions(text):
    """(word, rest) of each instruction; comments out, lines that go on joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def stages(text):
    """The instructions of each stage; the first entry holds what stands before any."""
    found = [[]]
    for word, rest in instructions(text):
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


FINAL = stages(DOCKERFILE)[-1]
DEFAULTS = dict(rest.split("=", 1) for word, rest in instructions(DOCKERFILE) if word == "ARG" and "=" in rest)
ENVIRONMENT = dict(pair.split("=", 1) for word, rest in FINAL if word == "ENV" for pair in shlex.split(rest))


def last(word):
    return [rest for found, rest in FINAL if found == word][-1]


# --- what it is built from -------------------------------------------------------------------------------------------


def test_the_base_has_the_cuda_that_the_lock_is_resolved_for():
    """Else the image asks for another driver than its libraries need."""
    tag = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-base-ubuntu24\.04", DEFAULTS["BASE_IMAGE"])
    lock = (ROOT / DEFAULTS["LOCK"]).read_text(encoding="utf-8")
    (runtime,) = re.findall(r"^nvidia-cuda-runtime==(\d+\.\d+)\.", lock, re.MULTILINE)

    assert tag
    assert tag[1] == runtime


def test_the_lock_is_resolved_for_the_python_of_the_base():
    """Ubuntu 24.04 has 3.12, and nothing else brings a Python into the image; Debian 13 has 3.13."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rule = makefile.split("\nlock:")[1].split("\n\n")[0]
    resolved = dict(re.findall(r"--python-version (\S+) --output-file (\S*cuda\S*)", rule))

    assert resolved == {"3.12": "locks/cuda.txt", "3.13": "$(VENV)/cuda-3.13.txt"}
    assert "cmp locks/cuda.txt $(VENV)/cuda-3.13.txt" in rule


def test_the_default_lock_is_the_one_for_cuda_and_goes_in_by_its_hashes():
    (install,) = [rest for word, rest in instructions(DOCKERFILE) if word == "RUN" and "pip --python" in rest]

    assert DEFAULTS["LOCK"] == "locks/cuda.txt"
    assert "locks/cpu.txt) hashes= ;; *) hashes=--require-hashes ;;" in install
    assert "install --no-compile ${hashes} --requirement" in install


def test_what_is_copied_from_the_checkout_exists():
    sources = []
    for word, rest in instructions(DOCKERFILE):
        if word == "COPY" and not rest.startswith("--from="):
            sources += rest.replace("${LOCK}", DEFAULTS["LOCK"]).split()[:-1]

    assert {"entrypoint.py", "job", "recipes", "LICENSE", "locks/cuda.txt"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_what_plan_fills_in_lies_beside_the_code_as_in_the_checkout():
    templates = [path.relative_to(ROOT) for path in ROOT.glob("*/ask.txt")]
    copied = [rest for stage in stages(DOCKERFILE) if ("WORKDIR", "/app") in stage for _, rest in stage]

    assert len(templates) == 2
    assert [path for path in templates if f"{path} {path.parent}/" not in copied] == []


def test_the_code_is_the_last_that_is_copied():
    """So that a change of code changes nothing below it."""
    words = [word for word, _ in FINAL]
    after = FINAL[len(words) - words[::-1].index("COPY") :]

    assert last("COPY") == "--from=code /app /app"
    assert {word for word, _ in after} == {"ARG", "LABEL"}
    assert [rest for word, rest in FINAL if word == "COPY" and not rest.startswith("--from=")] == []


def test_every_variable_of_a_build_is_explained_with_its_default():
    page = (ROOT / "docs" / "image.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", page, re.MULTILINE))
    arguments = {rest.split("=")[0] for word, rest in instructions(DOCKERFILE) if word == "ARG"}

    assert told.keys() == arguments - {"VERSION", "CREATED"} | {"IMAGE", "BUILDER", "BUILD_FLAGS"}
    assert [told[name] for name in ("BASE_IMAGE", "LOCK")] == [f"`{DEFAULTS[name]}`" for name in ("BASE_IMAGE", "LOCK")]


def test_the_way_to_older_drivers_names_a_base_and_a_lock_of_one_cuda():
    page = (ROOT / "docs" / "image.md").read_text(encoding="utf-8")
    ((lock, base),) = re.findall(
        r"LOCK=locks/cu(\d+)\.txt BASE_IMAGE=nvidia/cuda:(\d+\.\d+)\.\d+-base-ubuntu24\.04", page
    )

    assert lock == base.replace(".", "")
    assert f"make locks/cu{lock}.txt" in page


# --- what it is ------------------------------------------------------------------------------------------------------


def test_it_runs_as_a_user_with_a_number_that_is_not_root():
    """runAsNonRoot can be checked for numbers only."""
    assert last("USER") == "10001:10001"
    assert "--uid 10001 " in DOCKERFILE


def test_it_starts_the_job_through_an_init_and_without_a_shell():
    assert json.loads(last("ENTRYPOINT")) == ["/usr/bin/tini", "-s", "--", "/opt/venv/bin/python", "/app/entrypoint.py"]
    assert re.search(r"install -y .*\btini\b", DOCKERFILE.replace("\\\n", " "))


def test_without_a_command_it_says_so_and_does_not_end_with_0():
    """0 means that a report is committed."""
    assert json.loads(last("CMD")) == []


def test_every_job_variable_is_known_to_the_command_line():
    known = {p.envvar for c in (cli, *cli.commands.values()) for p in c.params if isinstance(p, click.Option)}
    mine = {name for name in ENVIRONMENT if name.startswith("JOB_")}

    assert mine == {"JOB_DEVICE", "JOB_WORKDIR"}
    assert mine <= known
    assert ENVIRONMENT["JOB_DEVICE"] == "cuda"


def test_all_that_is_written_lies_below_the_work_folder():
    places = {name: value for name, value in ENVIRONMENT.items() if re.search(r"HOME$|DIR$", name)}

    assert {"HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "JOB_WORKDIR"} <= places.keys()
    assert {name: value for name, value in places.items() if not re.match(r"/work(/|$)", value)} == {}


def test_the_temporary_folder_needs_nobody_to_make_it():
    """A fresh volume is empty, and tempfile makes no folders."""
    assert ENVIRONMENT["TMPDIR"] == "/work"
    assert re.search(r"install --directory --mode=1777 /work\b", DOCKERFILE)


def test_the_container_runtime_is_asked_for_the_gpu():
    assert ENVIRONMENT["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert ENVIRONMENT["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


def test_a_user_without_a_name_has_one():
    """getpass asks the environment first; torch names its cache by it."""
    assert ENVIRONMENT["USER"] == ENVIRONMENT["LOGNAME"] == "job"


# --- what reaches the builder ----------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A folder with all that may lie about in one."""
    for name in (
        *("Dockerfile", "entrypoint.py", "LICENSE", "README.md", "pyproject.toml", ".env", "pip.conf", ".netrc"),
        *(".git/config", ".venv/bin/python", ".demo/store/report.json", "work/models/model.safetensors", ".lab/key"),
        *("job/cli.py", "job/core/errors.py", "job/__pycache__/cli.cpython-312.pyc", "job/core/__pycache__/e.pyc"),
        *("recipes/demo.yaml", "recipes/shop-orders/train.jsonl", "recipes/demo-base/model.safetensors"),
        *("locks/cuda.txt", "tests/conftest.py"),
        *("k8s/ask.txt", "k8s/secret.yaml", "slurm/ask.txt", "slurm/train.sbatch", "bench/RESULTS.md", "sbom.cdx.json"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


def test_only_what_the_image_is_made_of_goes_to_the_builder(checkout):
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {path for path in exclude_paths(str(checkout), patterns) if (checkout / path).is_file()}

    assert sent - {"Dockerfile"} == {  # which the builder itself needs
        *("entrypoint.py", "LICENSE", "job/cli.py", "job/core/errors.py"),
        *("recipes/demo.yaml", "recipes/shop-orders/train.jsonl", "recipes/demo-base/model.safetensors"),
        "locks/cuda.txt",
        *("k8s/ask.txt", "slurm/ask.txt"),
    }


# --- the reader sees what it looks for -------------------------------------------------------------------------------


def test_instructions_are_read_as_a_builder_reads_them():
    text = "# one\nARG A=1\nFROM x AS y\nRUN a \\\n    # why\n    && b\nFROM y\nENV P=/work \\\n    Q=2\n"

    assert [(word, rest.split()) for word, rest in instructions(text)][2] == ("RUN", ["a", "&&", "b"])
    assert [len(stage) for stage in stages(text)] == [1, 2, 2]
    assert stages(text)[-1][1][1].split() == ["P=/work", "Q=2"]
