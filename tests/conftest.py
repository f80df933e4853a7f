"""Fixtures that several rooms share: a warm image, S3 servers over http and https, a proxy that injures requests."""

import gc
import sys
from pathlib import Path

import pytest
from faults import faulty_proxy
from hypothesis import settings
from servers import KINDS, S3Server, make_certificates, new_bucket, serve

# The job as a process, for every room that begins one.
sys.path.append(str(Path(__file__).parent / "run"))

from botocore_tables import read_once
from job_process import environment_without_job
from warm_image import warm_image

from job.core.library_settings import LIBRARY_SETTINGS

# No test depends on how fast the machine is, and none draws other cases on another day.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")

_TOGETHER = ("tests/run/", "tests/chaos/", "tests/hostile/")
"""Rooms whose files share a run that takes as long as a file of theirs: one pytest worker has all of a room."""
_LONG = (
    *_TOGETHER,
    "tests/launch/",
    *("tests/edge/run/test_lock", "tests/edge/store/test_stores", "tests/edge/base/test_fetching"),
    *("tests/k8s/test_container", "tests/k8s/test_two_pods", "tests/bench/", "tests/tune/", "tests/slurm/"),
)
"""What takes half a minute and more, the longest first, so that no worker waits for another one at the end."""
_ASKED_FOR = (
    *("stores", "slurm", "page", "trackers", "image", "image_cuda", "hostile", "families", "demo_base", "nightly"),
    *("chaos", "ranks", "bench"),
)
"""Markers of what needs more than a machine has, or minutes: it runs where -m names it."""


def _place(item):
    return next((place for place, start in enumerate(_LONG) if item.nodeid.startswith(start)), len(_LONG))


def pytest_collection_modifyitems(config, items):
    left_out = {marker for marker in _ASKED_FOR if marker not in config.option.markexpr}
    chosen, others = [], []
    for item in items:
        (chosen if left_out.isdisjoint(mark.name for mark in item.iter_markers()) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = sorted(chosen, key=_place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFileOrRoom(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return next((room for room in _TOGETHER if nodeid.startswith(room)), super()._split_scope(nodeid))

    return ByFileOrRoom(config, log)


def pytest_collection_finish():
    read_once()
    # What collection has imported stays; the collector would look through it again and again.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def warm():
    """A process that has loaded every library; attempts are forks of it, one image a pytest worker."""
    with warm_image(environment_without_job(LIBRARY_SETTINGS)) as image:
        yield image


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def _session_server(kind):
    @pytest.fixture(scope="session", name=kind.replace("-", "_"))
    def server(tmp_path_factory, certificates):
        with serve(kind, tmp_path_factory.mktemp(kind), certificates) as running:
            yield running

    return server


moto_http, moto_https, ministack_http, ministack_https = map(_session_server, KINDS)


@pytest.fixture
def s3_environment(monkeypatch):
    """Sets what an operator would set for a server, and nothing else."""

    def use(server: S3Server) -> None:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    return use


@pytest.fixture
def moto_place(moto_http, s3_environment):
    s3_environment(moto_http)
    return new_bucket(moto_http)


@pytest.fixture
def ministack_place(ministack_http, s3_environment):
    s3_environment(ministack_http)
    return new_bucket(ministack_http)


@pytest.fixture
def proxy(moto_http):
    with faulty_proxy(moto_http.endpoint) as running:
        yield running


@pytest.fixture
def faulty_place(moto_place, proxy, monkeypatch):
    """A bucket reached only through the proxy."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    return moto_place
