"""The container's command line from k8s/job.yaml, run as the pod runs it, against an S3 server."""

import json
import shutil
import signal
import tempfile
import uuid
from pathlib import Path

import pytest
import torch
from job_process import Job
from k8s_container import Node, ended, image_environment, may_mount
from run_material import long_recipe, make_base

MESSAGE_BYTES = 4096
"""What Kubernetes keeps of a termination message."""


@pytest.fixture(scope="module")
def bucket(moto_http, tmp_path_factory):
    """A bucket with a tiny base and data, and the recipe for them."""
    name, folder = f"b-{uuid.uuid4().hex[:12]}", tmp_path_factory.mktemp("material")
    client = moto_http.client()
    client.create_bucket(Bucket=name)
    job = long_recipe(Job(folder, make_base(folder / "base")))
    for kind in ("base", "data"):
        for path in (folder / kind).iterdir():
            client.upload_file(str(path), name, f"{kind}/{path.name}")
    job.recipe["model"]["base"] = f"s3://{name}/base"
    for key in ("train", "validation"):
        job.recipe["data"][key] = job.recipe["data"][key].replace(f"file://{folder}", f"s3://{name}")
    return name, job.recipe


@pytest.fixture
def node_folder():
    """Below /tmp, where other users may look, unlike pytest's own folders."""
    folder = Path(tempfile.mkdtemp(prefix="node-"))
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def recipe(bucket):
    """The recipe, with an output of its own."""
    name, recipe = bucket
    return {**recipe, "output": f"s3://{name}/out/{uuid.uuid4().hex[:8]}"}


def message(node):
    """The termination message, as Kubernetes reads it."""
    raw = node.log.read_bytes()
    assert len(raw) <= MESSAGE_BYTES
    return json.loads(raw.decode())


def stored(moto, recipe, name):
    """A file of the only run of the recipe."""
    bucket, _, prefix = recipe["output"].removeprefix("s3://").partition("/")
    listed = moto.client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/runs/").get("Contents", [])
    keys = [each["Key"] for each in listed if each["Key"].endswith(f"/{name}")]
    assert len(keys) <= 1, keys
    return json.loads(moto.client().get_object(Bucket=bucket, Key=keys[0])["Body"].read()) if keys else None


def test_a_pod_that_is_deleted_ends_75_and_the_next_one_ends_the_run(node_folder, recipe, moto_http, warm):
    node = Node(node_folder, recipe, warm)
    given = {**moto_http.environment(), "JOB_DEVICE": "cpu", "HOME": "/nonexistent"}
    with node.pod(**given) as running:
        running.until(lambda event: event["event"] == "step" and event["step"] >= 5)
        assert message(node)["state"] == "running"
        assert Path(f"/proc/{running.child.pid}").stat().st_uid == node.user
        running.child.send_signal(signal.SIGTERM)
        stopped = ended(running, node)
    said = message(node)
    assert stopped.code == said["code"] == 75, stopped.stdout + stopped.stderr
    assert said["last_committed_step"] >= 5
    assert "start the same job again" in said["action"]
    assert stopped.stderr == ""
    assert stored(moto_http, recipe, "report.json") is None
    assert {path.name for path in node_folder.iterdir()} <= {"termination-log", "recipe", "work", "root", "stderr"}

    with node.pod(**given) as running:
        done = ended(running, node)
    assert done.code == message(node)["code"] == 0, done.stdout + done.stderr
    assert done.named("resumed")[0]["step"] == said["last_committed_step"]
    report = stored(moto_http, recipe, "report.json")
    assert [attempt["exit_code"] for attempt in report["attempts"]] == [75, 0]


@pytest.mark.skipif(not may_mount(), reason="NO MOUNTS HERE: the container's read-only root is not tried")
def test_the_container_s_own_paths_on_a_root_that_is_read_only(node_folder, recipe, moto_http):
    """Nothing but /work, /dev/shm and the message can be written; another attempt then has nothing to do.

    No home is needed; the image's own is /work.
    """
    recipe["train"] = {**recipe["train"], "steps": 4}
    node = Node(node_folder, recipe, None)
    given = {**moto_http.environment(), "JOB_DEVICE": "cpu"}
    for nothing_left, home in ((False, {"HOME": "/nonexistent"}), (True, {})):
        with node.pod(**given, **home) as running:
            running.until(lambda event: event["event"] == "phase")
            assert Path(f"/proc/{running.child.pid}").stat().st_uid == node.user
            done = ended(running, node)
        assert done.code == message(node)["code"] == 0, done.stdout + done.stderr
        assert done.stderr == ""
        assert ("train" not in done.phases()) == nothing_left
    assert stored(moto_http, recipe, "report.json")["run_uri"].startswith(recipe["output"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible here")
def test_a_node_without_a_visible_gpu_ends_82(node_folder, recipe, moto_http, warm):
    """JOB_DEVICE as the manifest says it."""
    node = Node(node_folder, recipe, warm)
    with node.pod(**moto_http.environment()) as running:
        done = ended(running, node)

    assert done.code == message(node)["code"] == 82, done.stdout + done.stderr


def test_the_image_s_variables_are_read_from_the_dockerfile():
    assert image_environment().items() >= {"HOME": "/work", "TMPDIR": "/work", "JOB_DEVICE": "cuda"}.items()
