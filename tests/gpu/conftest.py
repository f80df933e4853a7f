"""The tests of the engines use the tune room's tiny models; one that fills the GPU runs alone on it."""

import fcntl
import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tune"))


@pytest.fixture(autouse=True)
def _room_on_the_gpu(request):
    """Where several processes share the tests out (pytest -n), those of one GPU may run beside each other."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace(",", "-")
    with Path(tempfile.gettempdir(), f"gpu-tests-{seen}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX if request.node.get_closest_marker("whole_gpu") else fcntl.LOCK_SH)
        yield
