"""The two locks: what the image is built from holds CUDA, and both pin the same software."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPU, CUDA = ROOT / "locks" / "cpu.txt", ROOT / "locks" / "cuda.txt"


def pins(lock):
    """Name -> versions."""
    found = {}
    for name, version in re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^\s;\\]+)", lock.read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


@pytest.mark.parametrize("package", ["nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton", "torch"])
def test_the_image_lock_resolves_to_cuda(package):
    assert package in pins(CUDA)


def test_the_image_lock_takes_torch_for_cuda_from_the_public_index():
    (version,) = pins(CUDA)["torch"]
    assert version == "2.13.0"  # +cpu would be an image that trains on the CPU


def test_every_package_of_the_image_has_hashes():
    blocks = re.split(r"^(?=[a-z0-9])", CUDA.read_text(), flags=re.MULTILINE)
    without = [block.split()[0] for block in blocks if "==" in block and "--hash=sha256:" not in block]
    assert without == []


def test_the_cpu_lock_brings_no_cuda():
    brought = {name for name in pins(CPU) if name.startswith(("nvidia", "cuda", "triton"))}
    assert brought == {"nvidia-ml-py"}  # Python alone: it asks a driver, where there is one


def test_both_locks_pin_the_same_software():
    cpu, cuda = pins(CPU), pins(CUDA)
    different = {name: (cpu[name], cuda[name]) for name in cpu.keys() & cuda.keys() if not cuda[name] <= cpu[name]}
    assert different == {}


def test_every_dependency_of_the_project_is_in_both_locks():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[a-z0-9-]+", dependency)[0] for dependency in project["dependencies"]}
    assert names <= pins(CPU).keys()
    assert names <= pins(CUDA).keys()


def test_the_image_can_ask_the_driver_about_the_gpu():
    assert "nvidia-ml-py" in pins(CUDA)


def test_no_lock_names_a_package_server():
    for lock in (CPU, CUDA):
        assert "://" not in lock.read_text()
