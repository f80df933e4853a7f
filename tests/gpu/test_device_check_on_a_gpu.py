"""The look before a run on a real GPU with its real driver; elsewhere these are skipped.

python -m pytest tests/gpu -s -rs
"""
# ruff: noqa: T201 - what is measured is printed

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from job.core.errors import SickDeviceError
from job.edge.host.gpu import look_at_gpu
from job.tune import device_check
from job.tune.device.device import choose_device, driver_version, gpu_bus_id, gpu_uuid
from job.tune.device_check import look_at_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu():
    return choose_device("cuda")


def in_a_process(code):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


# --- torch and the arithmetic ----------------------------------------------------------------------------------------


def test_a_good_gpu_is_let_through_in_seconds_with_random_numbers_as_they_were(gpu):
    torch.cuda.manual_seed(5)
    before = torch.get_rng_state(), torch.cuda.get_rng_state(gpu)
    began = time.monotonic()

    facts = look_at_device(gpu)

    seconds = time.monotonic() - began
    print(f"\n{facts}\n{seconds:.2f} s")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(torch.cuda.get_rng_state(gpu), before[1])
    assert facts.count >= 1
    assert 0 < facts.free_bytes <= facts.total_bytes
    assert float(facts.capability) >= 7.5
    assert facts.cuda == torch.version.cuda


@pytest.mark.parametrize("rows", [1, 64])
def test_the_4_bit_kernels_stay_well_within_what_rounding_allows(gpu, rows):
    """The bound is from the formats; how much of it is used says how far a fault could hide."""
    generator = torch.Generator().manual_seed(1)
    weight = device_check._four_bit_weight(2048, generator)
    given = torch.randn(64, 256, generator=generator).to(torch.bfloat16)
    multiply = device_check.four_bit(weight.to(gpu, torch.bfloat16))

    product = torch.cat([multiply(part) for part in given.to(gpu).split(rows)]).float().cpu()

    used = device_check._largest_difference(product, given.float() @ weight.T) / device_check._FOUR_BIT_TOLERANCE
    print(f"\n{rows} rows: {used:.2f} of the tolerance")
    assert used < 0.7


HOLD = """
import sys, torch
free, total = torch.cuda.mem_get_info()
held = torch.empty(int(free - 0.02 * total), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.whole_gpu
def test_a_gpu_that_another_process_fills_is_refused(gpu):
    """With the other's name where the driver names it."""
    holder = in_a_process(HOLD)
    try:
        assert holder.stdout.readline() == "held\n", holder.stderr.read()
        held_by = look_at_gpu(uuid=gpu_uuid(gpu), bus_id=gpu_bus_id(gpu)).held_by
        with pytest.raises(SickDeviceError) as caught:
            look_at_device(gpu, held_by=held_by)
    finally:
        holder.stdin.close()
        holder.wait(timeout=60)
    print(f"\n{caught.value}")
    assert "GiB are free; others hold the rest" in str(caught.value)
    look_at_device(gpu)  # once it is gone, nothing is refused


FAIL = """
import torch
from job.tune.device.failures import hardware_failure
try:
    torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")].cpu()
except RuntimeError as error:
    print(type(error).__name__, getattr(error, "error_code", None), hardware_failure(error))
"""


def test_a_real_cuda_error_carries_the_code_that_is_decided_by(gpu):
    """A kernel's assertion: no fault of the GPU's."""
    failing = in_a_process(FAIL)
    output, errors = failing.communicate(timeout=120)

    assert output == "AcceleratorError 710 None\n", errors[-2000:]


CHOOSE = """
from job.tune.device.device import choose_device
try:
    choose_device("cuda")
except Exception as error:
    print(error)
"""


def test_a_process_that_is_given_no_gpu_says_so(gpu):
    done = subprocess.run(
        ["/usr/bin/env", "CUDA_VISIBLE_DEVICES=", sys.executable, "-c", CHOOSE],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=True,
    )
    print(f"\n{done.stdout}")
    assert "no GPU is visible to this process (--device cuda): No CUDA GPUs are available" in done.stdout


# --- the driver ------------------------------------------------------------------------------------------------------


def test_the_driver_finds_the_gpu_that_cuda_computes_on_both_ways(gpu):
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py (extra `gpu`)")
    began = time.monotonic()

    health = look_at_gpu(uuid=gpu_uuid(gpu))

    print(f"\n{health}\n{time.monotonic() - began:.2f} s; bus {gpu_bus_id(gpu)}")
    assert health.uuid == f"GPU-{gpu_uuid(gpu)}"
    assert health.not_looked_at == ()
    assert health.driver_cuda is not None
    assert driver_version() in {health.driver, None}
    if gpu_bus_id(gpu) is not None:
        assert look_at_gpu(uuid=None, bus_id=gpu_bus_id(gpu)).uuid == health.uuid


def test_a_healthy_data_centre_gpu_answers_every_question(gpu):
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py (extra `gpu`)")
    if torch.cuda.get_device_capability(gpu) not in {(8, 0), (9, 0), (10, 0)}:
        pytest.skip("needs a data-centre GPU: others have no ECC counters")

    health = look_at_gpu(uuid=gpu_uuid(gpu))

    assert health.uncorrected_errors is not None
    assert health.remap_pending is not None
    assert health.temperature_celsius is not None
    assert health.recovery_action is not None or int(health.driver.partition(".")[0]) < 570
