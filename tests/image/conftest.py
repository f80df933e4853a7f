"""Images are built and run only where that is asked for, -m image or -m image_cuda; the rest is held in every run."""

import os

import pytest
from container_engine import find_engine
from image_base import make_debian

NOTHING_BUILDS = "nothing here builds and runs images: install docker, or podman, buildah and runc"


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    found = find_engine(tmp_path_factory.mktemp("engine"))
    if found is None:
        pytest.skip(NOTHING_BUILDS)
    return found


@pytest.fixture(scope="session")
def base_image(engine, tmp_path_factory):
    """The one that is named in BASE_IMAGE, else a Debian that is made here."""
    return os.environ.get("BASE_IMAGE") or make_debian(engine, tmp_path_factory.mktemp("debian"))
