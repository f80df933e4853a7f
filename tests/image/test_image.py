"""The image, built by `make image` from the lock for the CPU and run as a strict cluster runs it: make test-image."""

import hashlib
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import click
import pytest
from container_engine import Ended, work_folder
from image_build import CANARY, IMAGE, REVISION, build, python

from job.cli import cli

pytestmark = pytest.mark.image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    return tmp_path_factory.mktemp("secret") / "pip.conf"


@pytest.fixture(scope="module")
def built(engine, base_image, secret):
    """The image and what its build said."""
    done = build(ROOT, base_image, secret)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def image(built):
    return IMAGE


@pytest.fixture(scope="module")
def archive(engine, image, tmp_path_factory):
    """The image as a registry gets it, but not compressed."""
    path = tmp_path_factory.mktemp("archive") / "image.tar"
    engine.call("save", "--output", str(path), image)
    yield path
    path.unlink()


# --- what it is ------------------------------------------------------------------------------------------------------


def test_its_size_is_told_layer_by_layer(built):
    told = re.findall(r"^ +[\d.]+ ?[kMG]B  (.*)$", built.rpartition("from the base up:")[2], re.MULTILINE)

    assert [line for line in told if line.startswith("RUN apt-get")]
    assert "/app" in told[-2]
    assert told[-1] == "in all"


def test_its_settings_are_the_dockerfile_s(engine, image):
    about = engine.inspect(image)["Config"]
    variables = dict(pair.split("=", 1) for pair in about["Env"])
    known = {p.envvar for c in (cli, *cli.commands.values()) for p in c.params if isinstance(p, click.Option)}

    assert about["User"] == "10001:10001"
    assert not about.get("Cmd")
    assert {name for name in variables if name.startswith("JOB_")} - known == set()
    assert variables["JOB_DEVICE"] == "cuda"


def test_its_labels_say_what_it_was_made_of(engine, image, base_image):
    labels = {k.rpartition(".")[2]: v for k, v in engine.inspect(image)["Config"]["Labels"].items() if "opencont" in k}

    assert labels["revision"] == REVISION
    assert labels["version"] == re.search(r'__version__ = "(.*)"', (ROOT / "job/__init__.py").read_text())[1]
    assert labels["licenses"] == "Apache-2.0"
    assert labels["name"] == base_image
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["created"])


def test_it_holds_the_job_and_nothing_else_of_the_checkout(engine, image):
    listed = python(
        engine,
        image,
        "import os; print(*(os.path.relpath(os.path.join(d, f), '/app')"
        " for d, _, names in os.walk('/app') for f in names), sep='\\n')",
    ).splitlines()
    sources = {path for path in listed if "__pycache__" not in path}
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in ("job", "recipes")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    assert sources == expected | {"entrypoint.py", "LICENSE", "k8s/ask.txt", "slurm/ask.txt"}


def test_its_bytecode_is_there_as_nothing_is_written_at_run_time(engine, image):
    code = (
        "import importlib.util as u, os\n"
        "names = ('job.commands.run', 'job.tune.loop.step', 'torch', 'transformers', 'boto3')\n"
        "print([n for n in names if not os.path.exists(u.cache_from_source(u.find_spec(n).origin))])"
    )

    assert python(engine, image, code) == "[]"


def test_no_layer_holds_a_secret_or_what_only_the_build_needs(engine, archive, base_image):
    """Layers stay readable for whoever has the image, also when a later one deletes."""
    left = []
    with tarfile.open(archive) as outer:
        (about,) = json.load(outer.extractfile("manifest.json"))
        ours = about["Layers"][len(engine.layers(base_image)) :]
        for name in ours:
            with tarfile.open(fileobj=outer.extractfile(name)) as layer:
                left += [entry.name for entry in layer if entry.isfile() and _only_for_the_build(entry)]
    with archive.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = content.find(CANARY.encode())

    assert len(ours) >= 4
    assert left == []
    assert found == -1


def _only_for_the_build(entry):
    name = entry.name.removeprefix("./")
    caches = ("root/.cache", "var/cache/apt/archives", "var/lib/apt/lists", "home", "run/secrets", "work")
    return name.endswith(("pip.conf", ".netrc")) or (name.startswith(caches) and entry.size > 0)


def test_the_bill_of_materials_names_every_package(engine, image, tmp_path):
    bill = tmp_path / "sbom.cdx.json"
    subprocess.run(["make", "--directory", str(ROOT), "sbom", f"IMAGE={image}", f"SBOM={bill}"], check=True)
    parts = json.loads(bill.read_text())["components"]
    named = {unquote(part["purl"].split("?")[0]) for part in parts if "purl" in part}  # g%2B%2B is g++
    installed = python(
        engine,
        image,
        "import importlib.metadata as m; print(*(d.name.lower().replace('_', '-').replace('.', '-')"
        " + ' ' + d.version for d in m.distributions(path=[p for p in __import__('sys').path"
        " if p.startswith('/opt/venv')])), sep='\\n')",
    ).splitlines()
    debian = engine.start(image, "-W", "-f", "${Package} ${Version}\n", entrypoint="/usr/bin/dpkg-query").stdout

    assert len(installed) > 80
    assert {f"pkg:pypi/{line.replace(' ', '@')}" for line in installed} - named == set()
    assert len(debian.splitlines()) > 80
    assert {line.split()[0] for line in debian.splitlines()} - {
        name.split("/")[-1].split("@")[0] for name in named
    } == set()


# --- what a build does -----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A checkout of one's own."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Dockerfile", ".dockerignore", "Makefile", "entrypoint.py", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    for name in ("image", "job", "recipes", "locks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("k8s", "slurm"):
        (folder / name).mkdir()
        shutil.copy2(ROOT / name / "ask.txt", folder / name)
    return folder


def test_a_change_of_code_makes_only_the_last_thin_layer_anew(engine, image, base_image, copy, secret):
    """Who has the image pulls about a megabyte."""
    with (copy / "job" / "commands" / "run.py").open("a") as source:
        source.write("# changed\n")
    changed = f"{IMAGE}-changed"
    done = build(copy, base_image, secret, image=changed)
    assert done.returncode == 0, done.stdout[-5000:]

    before, after = engine.layers(image), engine.layers(changed)
    engine.call("rmi", changed)

    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]
    assert "Collecting" not in done.stdout


def test_a_lock_without_hashes_is_refused(image, base_image, copy, secret):
    """But for the one of the tests, by its name."""
    (copy / "locks" / "other.txt").write_text("six==1.17.0\n")
    done = build(copy, base_image, secret, lock="locks/other.txt", flags="--target packages", image=f"{IMAGE}-refused")

    assert done.returncode != 0
    assert "Hashes are required in --require-hashes mode" in done.stdout


# --- a strange user, a read-only root, no network --------------------------------------------------------------------


def test_help_answers(engine, image):
    ended = engine.start(image, "--help")

    assert ended.code == 0
    assert "Usage:" in ended.stdout


def test_without_a_command_it_ends_with_64(engine, image):
    """And not with 0: nothing was trained."""
    assert engine.start(image).code == 64


def test_a_user_that_nobody_knows_has_a_name_and_a_place_for_what_is_temporary(engine, image, tmp_path):
    said = python(
        engine,
        image,
        "import getpass, os, pwd, tempfile\n"
        "try: pwd.getpwuid(os.getuid())\n"
        "except KeyError: print(os.getuid(), getpass.getuser(), tempfile.gettempdir())",
        work=work_folder(tmp_path / "work"),
    )

    assert said == "12345 job /work"


def test_nothing_but_the_work_folder_can_be_written(engine, image, tmp_path):
    code = (
        "import pathlib\n"
        "for place in ('/app', '/tmp', '/opt/venv', '/var/tmp', '/root', '/etc', '/work'):\n"
        "    try: pathlib.Path(place, 'new').write_text(''); print(place)\n"
        "    except OSError: pass"
    )

    assert python(engine, image, code, work=work_folder(tmp_path / "work")) == "/work"


def test_torch_compile_finds_a_compiler_and_its_caches(engine, image, tmp_path):
    work = work_folder(tmp_path / "work")
    code = "import torch; print(torch.compile(lambda x: (x * 2 + 1).sum())(torch.ones(8)).item())"

    assert python(engine, image, code, work=work) == "24.0"
    assert list((work / "cache" / "inductor").rglob("*.so"))


def test_a_launcher_of_triton_s_kind_compiles(engine, image, tmp_path):
    """A C extension on Python's headers, by the C compiler: what Triton builds for each kernel."""
    code = (
        "import pathlib, subprocess, sysconfig\n"
        "pathlib.Path('/work/launcher.c').write_text("
        "'#include <Python.h>\\nint one(void) { return PY_MAJOR_VERSION; }')\n"
        "subprocess.run(['gcc', '-O3', '-shared', '-fPIC', '-I', sysconfig.get_paths()['include'],"
        " '-o', '/work/launcher.so', '/work/launcher.c'], check=True)\n"
        "import ctypes; print(ctypes.CDLL('/work/launcher.so').one())"
    )

    assert python(engine, image, code, work=work_folder(tmp_path / "work")) == "3"


# --- the demo, inside as outside -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """A run of the demo: where its work folder is, and how it ended."""

    work: Path
    ended: Ended

    @property
    def run(self) -> Path:
        (run,) = (self.work / "store" / "runs").iterdir()
        return run

    @property
    def report(self) -> dict:
        return json.loads((self.run / "report.json").read_text())

    @property
    def adapter(self) -> str:
        return hashlib.sha256((self.run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()

    @property
    def base(self) -> str:
        return hashlib.sha256((self.work / "base" / "model.safetensors").read_bytes()).hexdigest()


def command(work, *, store="store"):
    return ["run", "recipes/demo.yaml", "--set", f"model.base={work}/base", "--output", f"file://{work}/{store}"]


@pytest.fixture(scope="module")
def inside(engine, image, tmp_path_factory):
    work = work_folder(tmp_path_factory.mktemp("inside") / "work")
    base = engine.start(image, "recipes/demo_base.py", "/work/base", work=work, entrypoint="/opt/venv/bin/python")
    assert base.code == 0, base.stderr
    return Demo(work=work, ended=engine.start(image, *command("/work"), work=work, JOB_DEVICE="cpu"))


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    work = tmp_path_factory.mktemp("outside")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JOB_")}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

    def start(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        return Ended(code=done.returncode, stdout=done.stdout, stderr=done.stderr)

    base = start("recipes/demo_base.py", f"{work}/base")
    assert base.code == 0, base.stderr
    options = ["--workdir", str(work), "--device", "cpu"]
    return Demo(work=work, ended=start("entrypoint.py", *command(work), *options))


def test_the_demo_ends_inside_as_outside(inside, outside):
    """To the bit, as both have the same packages and as many threads."""
    assert inside.ended.code == outside.ended.code == 0, inside.ended.stderr
    assert inside.base == outside.base
    assert inside.report["sweet_spot"] == outside.report["sweet_spot"]
    assert inside.adapter == outside.adapter
    assert inside.report["sweet_spot"]["loss"] < inside.report["sweet_spot"]["base_loss"] / 100


def test_the_log_is_json(inside):
    assert [event["event"] for event in inside.ended.events][-1] == "finished"


def test_a_finished_run_is_shown_without_a_gpu(engine, image, inside):
    shown = engine.start(image, "report", f"file:///work/store/runs/{inside.run.name}", work=inside.work)

    assert shown.code == 0
    assert "validation loss" in shown.stdout


def test_without_a_gpu_and_without_a_word_about_it_the_job_ends_with_82(engine, image, inside):
    """It does not train on the CPU for a month."""
    ended = engine.start(image, *command("/work", store="another"), work=inside.work)

    assert ended.code == 82
    assert not list((inside.work / "another").glob("runs/*/checkpoints/*"))


def test_without_a_work_folder_it_says_what_is_missing(engine, image, inside, tmp_path):
    mounts = [f"{inside.work}/base:/base:ro", f"{work_folder(tmp_path / 'store')}:/store"]
    ended = engine.start(image, *command(""), mounts=mounts, JOB_DEVICE="cpu")

    assert ended.code == 74
    assert "/work" in ended.events[-1]["reason"]


def test_stopped_in_the_middle_it_ends_with_75_and_the_next_one_ends_as_if_nothing_had_been(engine, image, inside):
    """The signal goes to process 1, the init, which hands it on and returns the job's own code."""
    second = command("/work", store="stopped")
    # It stops itself in the middle and waits for us, on any machine.
    frozen = {"JOB_DEVICE": "cpu", "JOB_CRASH_AT": "step.after_update:60=freeze"}
    with engine.begun(image, *second, work=inside.work, **frozen) as container:
        container.until(lambda event: event["event"] == "step" and event["step"] >= 50)
        engine.wait_for(container, lambda processes: ") T " in processes)
        first = engine.call("exec", container.name, "cat", "/proc/1/comm").stdout.strip()
        engine.call("exec", container.name, "sh", "-c", "sleep 0.1 &")
        engine.wait_for(container, lambda processes: "(sleep)" not in processes)
        engine.call("kill", "--signal", "TERM", container.name)
        engine.call("kill", "--signal", "CONT", container.name)
        stopped = container.end()
    (run,) = (inside.work / "stopped" / "runs").iterdir()

    assert first == "tini"
    assert stopped.code == 75, stopped.stdout
    assert not (run / "report.json").exists()

    resumed = Demo(work=inside.work, ended=engine.start(image, *second, work=inside.work, JOB_DEVICE="cpu"))
    again = hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()

    assert resumed.ended.code == 0, resumed.ended.stderr
    assert [attempt["exit_code"] for attempt in json.loads((run / "report.json").read_text())["attempts"]] == [75, 0]
    assert again == inside.adapter
