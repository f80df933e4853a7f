"""What the chaos is made of: a server that dies, data and base in a bucket, an undisturbed run."""

import dataclasses
import os
from pathlib import Path

import pytest
from chaos_results import LEAST_STRIKES, Results, write_block
from chaos_runs import ENGINE, Place, Run, chaos_recipe
from chaos_server import mortal_server
from faults import faulty_proxy
from job_process import Job
from run_material import make_base

SURROUNDINGS = Path(__file__).with_name("surroundings")


@pytest.fixture(scope="session")
def seed():
    """Printed, and in the results: CHAOS_SEED=... draws the same moments again."""
    return os.environ.get("CHAOS_SEED", "5")


@pytest.fixture(scope="session")
def results(request, seed):
    """Collects what was done; at the end it goes into the file that CHAOS_RESULTS names, if all went well."""
    collected = Results(seed, ENGINE)
    yield collected
    if (path := os.environ.get("CHAOS_RESULTS")) and not request.session.testsfailed:
        assert collected.strikes >= LEAST_STRIKES
        write_block(Path(path), "chaos" if ENGINE == "auto" else f"chaos-{ENGINE}", collected.text())


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A tiny base, and a job of whose recipe and data these runs are."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "job").mkdir()
    return Job(folder / "job", make_base(folder / "base"))


@pytest.fixture(scope="session")
def folder_place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return Place(uri=f"file://{folder}", folder=folder, environment={})


@pytest.fixture(scope="session")
def folder_recipe(material):
    return chaos_recipe(material.recipe)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with mortal_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def s3_place(server, material):
    """A bucket with the base and the data in it; what the server answers for stands on its disk."""
    client = server.at.client()
    client.create_bucket(Bucket="chaos")
    for folder, prefix in ((Path(material.recipe["model"]["base"]), "base"), (material.data, "data")):
        for path in folder.iterdir():
            client.upload_file(str(path), "chaos", f"{prefix}/{path.name}")
    return Place(uri="s3://chaos", folder=server.bucket("chaos"), environment=server.at.environment())


@pytest.fixture(scope="session")
def s3_recipe(material, s3_place):
    recipe = chaos_recipe(material.recipe)
    data = {**recipe["data"], "train": "s3://chaos/data/train*.jsonl", "validation": "s3://chaos/data/validation.jsonl"}
    return {**recipe, "model": {"base": "s3://chaos/base"}, "data": data}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, s3_place, s3_recipe, warm):
    """A run that nothing happens to, and its attempt."""
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", s3_place.below("undisturbed"), s3_recipe, warm)
    attempt = run.begin()
    assert attempt.wait() == 0, attempt.told()
    return run, attempt


@pytest.fixture(scope="session")
def undisturbed_in_a_folder(tmp_path_factory, folder_place, folder_recipe, warm):
    run = Run(tmp_path_factory.mktemp("in-a-folder") / "run", folder_place.below("undisturbed"), folder_recipe, warm)
    attempt = run.begin()
    assert attempt.wait() == 0, attempt.told()
    return run, attempt


@pytest.fixture
def proxied(tmp_path, s3_place, s3_recipe, server, warm):
    """A run on S3 that reaches its store through a proxy, in surroundings that obey CHAOS_..., and the proxy."""
    with faulty_proxy(server.at.endpoint) as proxy:
        place = s3_place.below(tmp_path.name)
        ours = {"PYTHONPATH": str(SURROUNDINGS), "AWS_ENDPOINT_URL": proxy.endpoint}
        place = dataclasses.replace(place, environment=place.environment | ours)
        yield Run(tmp_path / "run", place, s3_recipe, warm), proxy
