"""The image is built and run only where that is asked for, -m image; the Dockerfile's claims are held in every run."""

import os

import pytest
from container_engine import find_engine
from image_base import make_base

CPU_LOCK = "locks/cpu.txt"


def pytest_collection_modifyitems(config, items):
    if "image" in config.option.markexpr:
        return
    chosen = [item for item in items if item.get_closest_marker("image") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    found = find_engine(tmp_path_factory.mktemp("engine"))
    if found is None:
        pytest.skip("nothing here builds and runs images: install docker, or podman, buildah and runc")
    return found


@pytest.fixture(scope="session")
def base_image(engine, tmp_path_factory):
    """The one that is named in BASE_IMAGE, else a Debian that is made here."""
    return os.environ.get("BASE_IMAGE") or make_base(engine, tmp_path_factory.mktemp("debian"))
