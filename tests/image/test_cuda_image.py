"""The image as it ships, from the lock for CUDA, on a machine without a GPU: make test-image-cuda."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from conftest import NOTHING_BUILDS
from container_engine import UID, find_engine, work_folder
from image_base import TRIXIE, make_debian
from image_build import build, python
from job_process import write_lines
from run_material import make_base
from typed_commands import blocks

pytestmark = pytest.mark.image_cuda

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "locks" / "cuda.txt").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "image.md").read_text(encoding="utf-8")
IMAGE = "localhost/qlora-job-test-cuda"
DISK_GB = 30
"""What the build takes at its peak, with what was downloaded and the layers of its stages."""
FABRIC = "nvshmem_bootstrap_(mpi|pmix|shmem)|nvshmem_transport_(ibdevx|ibgda|libfabric|ucx)|libcufile_rdma"
"""Libraries of CUDA for InfiniBand, MPI and the like: what they need only such a node has."""


def pins():
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^\s;\\]+)", LOCK, re.MULTILINE))


def wheels(*wanted, python):
    """What uv says of installing on another Python, without downloading: it names what has no wheel for it."""
    command = [Path(sys.executable).with_name("uv"), "pip", "install", "--dry-run", "--no-deps", "--only-binary=:all:"]
    system = [f"--python-version={python}", "--python-platform=x86_64-manylinux_2_28"]
    with tempfile.TemporaryDirectory() as empty:
        where = ["--target", empty]
        return subprocess.run([*command, *system, *where, *wanted], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def storage():
    """A folder for all that podman and buildah make here: other images, and what builds have kept, are left alone."""
    place = os.environ.get("TMPDIR", "/var/tmp")  # not /tmp, which may lie in memory
    if (free := shutil.disk_usage(place).free) < DISK_GB * 1e9:
        pytest.skip(f"{free / 1e9:.0f} GB are free in {place}, and {DISK_GB} are needed: name another place in TMPDIR")
    folder = Path(tempfile.mkdtemp(prefix="qlora-job-cuda-", dir=place))
    yield folder
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        if line.split(" ")[1].startswith(f"{folder}/"):
            subprocess.run(["umount", line.split(" ")[1]], check=True)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def engine(storage, tmp_path_factory):
    found = find_engine(tmp_path_factory.mktemp("engine"), storage=storage)
    if found is None:
        pytest.skip(NOTHING_BUILDS)
    served = wheels(f"torch==={pins()['torch']}", python="3.13")  # ===: not 2.13.0+cpu
    if served.returncode:
        pytest.skip(f"no index that is reached from here serves the build of torch for CUDA: {served.stderr}")
    return found


@pytest.fixture(scope="module")
def built(engine, tmp_path_factory):
    """What the build said."""
    base = os.environ.get("BASE_IMAGE") or make_debian(engine, tmp_path_factory.mktemp("debian"), TRIXIE)
    secret = tmp_path_factory.mktemp("secret") / "pip.conf"
    kept = {name: value for name, value in engine.environment.items() if name != "CONTAINERS_CONF"}
    done = build(ROOT, base, secret, image=IMAGE, lock="locks/cuda.txt", environment=kept)
    assert done.returncode == 0, done.stdout[-5000:]
    yield done.stdout.rpartition("from the base up:")[2]
    engine.call("rmi", "--force", IMAGE)


@pytest.fixture(scope="module")
def image(built):
    return IMAGE


@pytest.fixture(scope="module")
def inside(engine, image, tmp_path_factory):
    """What inside_cuda.py finds in the image."""
    work = work_folder(tmp_path_factory.mktemp("inside") / "work")
    script = f"{Path(__file__).with_name('inside_cuda.py')}:/inside.py:ro"
    ended = engine.start(image, "/inside.py", work=work, mounts=[script], entrypoint="/opt/venv/bin/python")
    assert ended.code == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def gigabytes(text):
    return float(text.split()[0]) * {"kB": 1e-6, "MB": 1e-3, "GB": 1}[text.split()[1]]


def test_the_sizes_of_the_layers_are_those_of_the_page(built):
    """Within a tenth: bases and compilers grow with every update of theirs."""
    measured = [gigabytes(size) for size in re.findall(r"^ +([\d.]+ ?[kMG]B)  ", built, re.MULTILINE)]
    print(built)  # noqa: T201 - the figures for the page
    told = [gigabytes(size) for size in re.findall(r"^\| .* \| .* \| ([\d.]+ [kMG]B) \|$", PAGE, re.MULTILINE)]

    assert measured == pytest.approx(told, rel=0.1, abs=0.05)


@pytest.mark.parametrize("python", ["3.12", "3.13"])
def test_the_lock_has_a_wheel_of_every_package_for_the_pythons_that_it_is_for(engine, python):
    """3.12 is that of the Dockerfile's own base, 3.13 that of Debian 13; the image of these tests has one of them."""
    found = wheels("--require-hashes", "--requirement", ROOT / "locks" / "cuda.txt", python=python)

    assert f"Would install {len(pins())} packages" in found.stderr


def test_the_packages_are_those_of_the_lock(inside):
    assert {name: about["version"].removesuffix("+cu130") for name, about in inside["packages"].items()} == pins()


def test_every_package_can_be_imported(inside):
    assert {name: about["failed"] for name, about in inside["packages"].items() if about["failed"]} == {}


def test_what_brings_no_module_brings_libraries_of_cuda(inside):
    """But for a package that is only a list of others."""
    without = {name for name, about in inside["packages"].items() if not about["modules"]}

    assert {name for name in without if not name.startswith("nvidia-")} == {"cuda-toolkit"}
    assert len(inside["libraries"]) > 40


def test_every_library_of_cuda_is_loaded(inside):
    """The driver's own, libcuda.so.1, is missing here: what asks for it does so when it is used."""
    failed = {name: why for name, why in inside["libraries"].items() if why and not re.search(FABRIC, name)}

    assert failed == {}
    assert [name for name in inside["libraries"] if re.fullmatch(r"bitsandbytes/libbitsandbytes_cuda\d+\.so", name)]


def test_torch_is_for_the_cuda_of_the_base(inside):
    (base,) = re.findall(r"^ARG BASE_IMAGE=nvidia/cuda:(\d+\.\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)

    assert inside["torch"]["cuda"] == base
    assert not inside["torch"]["available"]


def test_triton_compiles_a_kernel_to_machine_code(inside):
    assert inside["kernel_bytes"] > 1000


# --- where no GPU is visible: a pod of k8s/job.yaml, and the page's own line ------------------------------------------


@pytest.fixture
def there(tmp_path):
    """Base, data and store of a recipe in folders, in place of the network: mounts and variables."""
    given = tmp_path / "given"
    make_base(given / "base")
    write_lines(given / "train.jsonl", [{"input": f"{number} hats", "output": f"{number}"} for number in range(40)])
    overrides = ("model.base=/given/base", "model.revision=null", "data.train=file:///given/train.jsonl")
    variables = {"JOB_SET": "\n".join(overrides), "JOB_OUTPUT": "file:///work/store"}
    for folder in (tmp_path, *given.rglob("*"), given):
        folder.chmod(folder.stat().st_mode | 0o055)
    return [f"{given}:/given:ro"], variables


@pytest.fixture
def pod(tmp_path, there):
    """What kubelet and runtime make of the manifest: a user, options, variables, volumes."""
    documents = list(yaml.safe_load_all((ROOT / "k8s" / "job.yaml").read_text(encoding="utf-8")))
    (recipe,) = [each["data"] for each in documents if each["kind"] == "ConfigMap"]
    (spec,) = [each["spec"]["template"]["spec"] for each in documents if each["kind"] == "Job"]
    (trainer,) = spec["containers"]
    own, strict = spec["securityContext"], trainer["securityContext"]
    assert strict == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }  # what the engine always asks for
    assert own["seccompProfile"] == {"type": "RuntimeDefault"}  # the engine's default
    (tmp_path / "recipe").mkdir()
    for name, text in recipe.items():
        (tmp_path / "recipe" / name).write_text(text, encoding="utf-8")
    (tmp_path / "work").mkdir()
    os.chown(tmp_path / "work", 0, own["fsGroup"])
    (tmp_path / "work").chmod(0o2775)
    (tmp_path / "message").touch()
    (tmp_path / "message").chmod(0o666)
    mounts, variables = there
    requests = trainer["resources"]["requests"]
    variables |= {each["name"]: each.get("value", requests["cpu"]) for each in trainer["env"]}
    memory = trainer["resources"]["limits"]["memory"].removesuffix("i").lower()
    return trainer["args"], {
        "user": f"{own['runAsUser']}:{own['runAsGroup']}",
        "options": ["--memory", memory, "--shm-size", "1g", "--pids-limit", "4096"],
        "work": tmp_path / "work",
        "mounts": [
            *mounts,
            f"{tmp_path / 'recipe'}:/recipe:ro",
            f"{tmp_path / 'message'}:{trainer['terminationMessagePath']}",
        ],
        **variables,
    }


def test_a_pod_on_a_node_whose_gpu_is_not_visible_ends_82_before_it_fetches_anything(engine, image, pod, tmp_path):
    """A minute at most on a node; how long it took here is printed."""
    arguments, settings = pod
    begun = time.monotonic()
    ended = engine.start(image, *arguments, **settings)
    print(f"{time.monotonic() - begun:.0f} s until exit code {ended.code}")  # noqa: T201 - a figure for the page
    message = json.loads((tmp_path / "message").read_text())

    assert ended.code == message["code"] == 82, ended.stdout + ended.stderr
    assert "no GPU is visible" in message["reason"]
    assert [event["name"] for event in ended.events if event["event"] == "phase"][-1] == "preflight"
    assert ended.stderr == ""


def test_the_line_of_the_page_is_typed(engine, image, there, tmp_path):
    """With this engine and this image, a volume that goes with the test, and what stands in place of the network."""
    (mount,), variables = there
    (line,) = [re.sub(r"\\\n\s*", "", block).strip() for block in blocks(PAGE) if block.startswith("docker run")]
    (tmp_path / "recipe.yaml").write_text((ROOT / "recipes" / "llama2-7b.yaml").read_text(encoding="utf-8"))
    typed = line.replace("docker run", f"{engine.program} run --network none {' '.join(engine.run_options)}")
    typed = typed.replace(" ... ", f" -v {mount} {' '.join(f'-e {name}' for name in variables)} ")
    typed = typed.replace(" qlora-job run", f" {image} run")
    if engine.program == "docker":
        typed = typed.replace(" --gpus all", "")  # where there is none it does not start; podman starts
    assert typed.count("qlora-job run") == 0
    work = f"qlora-job-test-{os.getpid()}"
    done = subprocess.run(
        ["bash", "-c", typed.replace("qlora-work:", f"{work}:")],
        cwd=tmp_path,
        env=os.environ | dict(engine.environment) | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    engine.call("volume", "rm", work)

    assert done.returncode == 82, done.stdout + done.stderr


def test_a_user_that_nobody_knows_can_do_without_a_home(engine, image, tmp_path):
    work = work_folder(tmp_path / "work")

    assert python(engine, image, "import os; print(os.getuid(), os.environ['HOME'])", work=work) == f"{UID} /work"
