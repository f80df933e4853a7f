"""Fixtures of the whole job: a tiny random base, made once a session, and a job on it."""

import sys
from pathlib import Path

import pytest

# Tiny models of every kind.
sys.path.append(str(Path(__file__).parents[1] / "tune"))

from job_process import Job
from run_material import SECRETS, long_recipe, make_base


def pytest_collection_modifyitems(config, items):
    if "nightly" in config.option.markexpr:
        return
    chosen = [item for item in items if item.get_closest_marker("nightly") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A Llama of two layers with random weights and a word tokenizer of its own."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def job(tmp_path, base, warm):
    return Job(tmp_path, base, warm)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, base):
    """An undisturbed run by the real command, and how its process ended; look, do not touch.

    It is what the runs that are stopped and gone on with, forks of a warm image, are compared with to the bit.
    """
    job = long_recipe(Job(tmp_path_factory.mktemp("finished"), base))
    return job, job.start("run", cold=True, **SECRETS)
