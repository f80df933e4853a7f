"""A base image where none can be pulled: Debian, unpacked from its own packages."""

import os
import shutil
import subprocess

import pytest

BOOKWORM, TRIXIE = "bookworm", "trixie"
"""Debian 12 has Python 3.11, Debian 13 has 3.13; the lock for CUDA is for 3.12 and 3.13."""
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")


def make_debian(engine, folder, suite=BOOKWORM):
    """The name of an image with a small Debian, made once and kept, as a base that was pulled is kept."""
    name = f"localhost/qlora-job-test-debian:{suite}"
    if engine.has(name):
        return name
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        pytest.skip("no base image: name one in BASE_IMAGE, or be root and install debootstrap, which makes one")
    root, archive = folder / "root", folder / "root.tar"
    included = ["--variant=minbase", "--include=ca-certificates"]
    subprocess.run(["debootstrap", *included, suite, root, MIRROR], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(root / "var/cache/apt/archives")
    subprocess.run(["tar", "--directory", root, "--create", "--file", archive, "."], check=True)
    engine.call("import", str(archive), name)
    shutil.rmtree(root)
    archive.unlink()
    return name
