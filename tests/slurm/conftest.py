"""A real Slurm for the tests that are marked so; the others need none."""

import pytest
from cluster import slurm, staged_recipe, why_not
from job_process import Job
from run_material import make_base


@pytest.fixture(scope="session")
def cluster():
    reason = why_not()
    assert reason is None, reason  # who asks for these tests wants them to run
    with slurm() as running:
        yield running


@pytest.fixture
def real_slurm(cluster):
    """The cluster, without a job of an earlier test."""
    yield cluster
    cluster.clear()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture
def job(tmp_path, tiny_base):
    return staged_recipe(Job(tmp_path, tiny_base))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, tiny_base):
    """The report of a run that nothing happened to, without Slurm."""
    job = staged_recipe(Job(tmp_path_factory.mktemp("undisturbed"), tiny_base))
    ended = job.start("run")
    assert ended.code == 0, ended.stdout + ended.stderr
    return job.report()
