"""Trackers of flesh and blood are tried only where they are asked for: -m trackers."""

import sys
from pathlib import Path

import pytest

# The job as a process, and what its runs are made of.
sys.path.append(str(Path(__file__).parents[1] / "run"))

from job_process import Job
from run_material import make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def job(tmp_path, base):
    """Without a warm image: these libraries bring programs and hooks of their own, as an operator has them."""
    return Job(tmp_path, base)
