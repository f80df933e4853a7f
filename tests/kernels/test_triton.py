"""The Triton kernels against the reference, by Triton's interpreter: no GPU is needed, and nothing is compiled."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

triton = pytest.importorskip("triton", reason="NO TRITON: its kernels are not tried here")
if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
    pytest.skip("Triton's interpreter before 3.7 fails with this numpy (int() of an array)", allow_module_level=True)

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).parent / "kernel_cases.py"
TRIED = [
    "attention",
    "attention_grouped",
    "attention_windowed",
    "attention_barely_windowed",
    "attention_with_sinks",
    "attention_windowed_with_sinks",
    "dequantise",
    "dequantise_across_rows",
    "dequantise_experts",
    "gate_forward",
    "gate_backward",
    "combine_rows",
    "sums_by_expert",
    "rms_forward",
    "rms_backward_add",
    "rotate",
    "rotate_normed",
    "rotate_backward",
    "rotate_backward_normed",
    "swiglu_forward",
    "swiglu_backward",
    "cross_entropy_in_place",
    "masked_ranks",
    "masked_gradient",
    "masked_add",
]


@functools.cache
def differences():
    """Case -> largest difference, as a share of the largest value. Triton takes its interpreter when it is imported."""
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(
        [sys.executable, str(CASES)], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", TRIED)
def test_a_kernel_computes_what_the_reference_does(case):
    assert differences()[case] < 1e-5


def test_every_kernel_has_a_case_and_every_case_is_looked_at():
    from job.kernels.ops import Ops

    assert sorted(differences()) == sorted(TRIED)
    tried = " ".join(differences())
    assert [name for name in vars(Ops) if not name.startswith("_") and name.removesuffix("_forward") not in tried] == []
