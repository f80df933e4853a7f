"""Trackers of flesh and blood are tried only where they are asked for: -m trackers."""

import sys
from pathlib import Path

import pytest

# The job as a process, and what its runs are made of.
sys.path.append(str(Path(__file__).parents[1] / "run"))

from job_process import Job
from run_material import make_base


def pytest_collection_modifyitems(config, items):
    if "trackers" in config.option.markexpr:
        return
    chosen = [item for item in items if item.get_closest_marker("trackers") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def job(tmp_path, base):
    """Without a warm image: these libraries bring programs and hooks of their own, as an operator has them."""
    return Job(tmp_path, base)
