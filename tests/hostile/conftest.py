"""Attacks on what is read from outside, each in a process that may take little memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from job_process import ROOT, Job
from run_material import make_base

sys.path.insert(0, str(Path(__file__).parents[1] / "tune"))

from tiny_fixtures import bases, documents, start, tokenizer  # noqa: F401 - fixtures

LIMITED = Path(__file__).with_name("limited")


@pytest.fixture(params=[40, pytest.param(600, marks=pytest.mark.hostile)])
def often(request):
    """Settings of a property that is tried so many times."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=request.param, deadline=None, suppress_health_check=quiet)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


class LimitedJob(Job):
    """A job whose process may take so many bytes beside the libraries."""

    def attacked(self, name="run", *options, mib, **environment):
        limits = {"PYTHONPATH": str(LIMITED), "HOSTILE_BYTES": str(mib * 2**20)}
        return self.start(name, *options, **limits, **environment)


@pytest.fixture
def job(tmp_path, base, warm):
    return LimitedJob(tmp_path, base, warm)


@pytest.fixture
def limited():
    """Runs code in a process that may take so many MiB once it has called `limit()`; returns what it prints."""

    def run(code, *arguments, mib):
        program = f"import runpy\ndef limit(): runpy.run_path({str(LIMITED / 'sitecustomize.py')!r})\n{code}"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HOSTILE_BYTES": str(mib * 2**20)}
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            check=False,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    return run
