"""The copy of the base in 4 bits, through the whole job: what it saves, and that it changes nothing."""

import shutil

import pytest
from job_process import Job
from run_material import make_base
from servers import new_bucket

from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store


@pytest.fixture(scope="module")
def first(tmp_path_factory, moto_http):
    """A run of 2 steps whose base stands on an S3 server, and a copy of it is kept there too: the job, its report."""
    folder, place = tmp_path_factory.mktemp("first"), new_bucket(moto_http)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in moto_http.environment().items():
            patch.setenv(name, value)
        base, store = make_base(folder / "base"), open_store(f"{place.root}/base", StoreSettings())
        for path in base.iterdir():
            store.upload(path, path.name, should_stop=lambda: False)
        job = Job(folder, base)
        job.recipe["model"] = {"base": f"{place.root}/base", "quantised_copies": f"{place.root}/copies"}
        job.recipe["train"]["steps"] = 2
        ended = job.call("run", "--run-id", "one")
        assert ended.code == 0, ended.stdout
        yield job, job.report()


@pytest.fixture
def second(first, tmp_path):
    """The same recipe for another output, and a work folder as the first run left it; not started yet."""
    job = Job(tmp_path, first[0].folder / "base")
    job.recipe = first[0].recipe | {"output": f"file://{job.store}"}
    shutil.copytree(first[0].workdir, job.workdir)
    return job


def start(job):
    ended = job.call("run", "--run-id", "one")
    assert ended.code == 0, ended.stdout
    return ended, job.report()


def results(report):
    """All that the base has a part in."""
    adapter = report["adapter"]["files"]["adapter_model.safetensors"]["sha256"]
    losses = [evaluation["loss"] for evaluation in report["evaluations"]]
    return adapter, report["curve"]["loss"], losses, report["answers"], report["adapter"]["proven_loss"]


def weights(job):
    """What of the base in 16 bits stands in the work folder."""
    return [path for path in job.workdir.rglob("model.safetensors") if "quantised" not in path.parts]


def test_a_second_start_needs_neither_download_nor_quantisation_and_gives_the_same_to_the_bit(first, second):
    assert first[1]["model"]["loaded_from"] == "weights"
    for path in weights(second):
        path.unlink()

    ended, report = start(second)
    assert report["model"]["loaded_from"] == "copy in 4 bits"
    assert weights(second) == []
    assert results(report) == results(first[1])
    assert "keep_copy" not in ended.phases()
    assert ended.named("start")[0]["base_from"] == "copy in 4 bits"


def test_a_machine_that_was_never_used_takes_the_copy_from_the_store(first, second):
    shutil.rmtree(second.workdir)

    report = start(second)[1]
    assert report["model"]["loaded_from"] == "copy in 4 bits"
    assert weights(second) == []
    assert results(report) == results(first[1])


def test_a_damaged_copy_is_told_and_the_weights_are_taken(first, second):
    second.recipe["model"] = {"base": second.recipe["model"]["base"]}
    (shard,) = second.workdir.rglob("model-00001.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")

    ended, report = start(second)
    assert [event["files"] for event in ended.named("quantised_copy_damaged")] == [["model-00001.safetensors"]]
    assert report["model"]["loaded_from"] == "weights"
    assert results(report) == results(first[1])


def test_a_place_for_copies_that_is_none_ends_64(job):
    job.recipe["model"]["quantised_copies"] = "http://somewhere/copies"
    ended = job.call("run")
    assert ended.code == 64
    assert "http://: no such kind of store" in ended.outcome["reason"]
