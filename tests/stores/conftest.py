"""Tests against real stores run only where they are asked for: -m stores. Each store is started once."""

import sys
from pathlib import Path

import pytest

# The job as a process, and what its runs are made of.
sys.path.append(str(Path(__file__).parents[1] / "run"))

import real_stores
from servers import new_bucket


@pytest.fixture(scope="session")
def ceph(tmp_path_factory, certificates):
    with real_stores.ceph(tmp_path_factory.mktemp("ceph"), certificates) as addresses:
        yield addresses


@pytest.fixture(scope="session")
def swift(tmp_path_factory, certificates):
    with real_stores.swift(tmp_path_factory.mktemp("swift"), certificates) as addresses:
        yield addresses


@pytest.fixture(params=real_stores.SCHEMES)
def ceph_place(request, ceph, s3_environment):
    s3_environment(ceph[request.param])
    return new_bucket(ceph[request.param])


@pytest.fixture(params=real_stores.SCHEMES)
def swift_place(request, swift, s3_environment):
    s3_environment(swift[request.param])
    return new_bucket(swift[request.param])
