"""Whole runs on a real GPU, stopped and gone on with; elsewhere these are skipped.

python -m pytest tests/gpu -s -rs
"""

import hashlib
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from job.core.recipe.schema import Optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
from job_process import Job, StopIn, call
from run_material import make_base

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def run(job, engine, *, stop_in=None):
    interrupt = StopIn(stop_in, job.outcome_file) if stop_in else None
    options = [*job.command("run")[2:], "--device", "cuda", "--gpus", "1", "--engine", engine]
    job.outcome_file.unlink(missing_ok=True)
    return call(*options, interrupt=interrupt, outcome_file=job.outcome_file)


def digest(job):
    return hashlib.sha256((job.only_run() / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("engine", ["fast", "generic"])
@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_what_is_stopped_and_gone_on_with_is_the_same_to_the_bit(tmp_path, base, optimizer, engine):
    """What a checkpoint holds of each optimizer is what this device's optimizer keeps, or it would be passed over."""
    digests = []
    for stopped in (False, True):
        job = Job(tmp_path / str(stopped), base)
        job.recipe["lora"]["targets"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        job.recipe["train"]["optimizer"] = optimizer
        if stopped:
            assert run(job, engine, stop_in="train").code == 75
        ended = run(job, engine)
        assert ended.code == 0, ended.stdout[-2000:]
        assert not ended.named("checkpoint_passed_over")
        report = job.report()
        assert report["resume_exact"] is True
        assert report["plan"]["engine"] == engine
        assert len(report["attempts"]) == 1 + stopped
        digests.append(digest(job))
    assert digests[0] == digests[1]
