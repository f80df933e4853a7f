"""Fixtures of commands that work with several processes: a job on a tiny base, without dropout."""

import sys
from pathlib import Path

import pytest

# Tiny families of decoders.
sys.path.append(str(Path(__file__).parents[1] / "tune"))

from job_process import Job
from run_material import long_recipe, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def job(tmp_path, base, warm):
    made = long_recipe(Job(tmp_path, base, warm))
    made.recipe["lora"]["dropout"] = 0.0
    return made


@pytest.fixture(scope="session")
def alone(tmp_path_factory, base, warm):
    """The report of the same recipe, carried by one process."""
    job = long_recipe(Job(tmp_path_factory.mktemp("alone"), base, warm))
    job.recipe["lora"]["dropout"] = 0.0
    ended = job.start("run")
    assert ended.code == 0, ended.stdout
    return job.report()
