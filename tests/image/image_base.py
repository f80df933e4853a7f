"""A base image where none can be pulled: Debian, unpacked from its own packages."""

import os
import shutil
import subprocess

import pytest

NAME = "localhost/qlora-job-test-debian:bookworm"
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")


def make_base(engine, folder):
    """The name of an image with a small Debian 12, made once and kept, as a base that was pulled is kept."""
    if engine.has(NAME):
        return NAME
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        pytest.skip("no base image: name one in BASE_IMAGE, or be root and install debootstrap, which makes one")
    root, archive = folder / "root", folder / "root.tar"
    included = ["--variant=minbase", "--include=ca-certificates"]
    subprocess.run(["debootstrap", *included, "bookworm", root, MIRROR], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(root / "var/cache/apt/archives")
    subprocess.run(["tar", "--directory", root, "--create", "--file", archive, "."], check=True)
    engine.call("import", str(archive), NAME)
    shutil.rmtree(root)
    archive.unlink()
    return NAME
