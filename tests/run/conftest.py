"""Fixtures of the whole job: a tiny random base, made once a session, and a job on it."""

import pytest
from job_process import Job
from run_material import SECRETS, long_recipe, make_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A Llama of two layers with random weights and a word tokenizer of its own."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def job(tmp_path, base):
    return Job(tmp_path, base)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, base):
    """An undisturbed run and how its process ended; look, do not touch."""
    job = long_recipe(Job(tmp_path_factory.mktemp("finished"), base))
    return job, job.start("run", **SECRETS)
