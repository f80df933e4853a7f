"""Which device is taken, what names it, and which failures are its own."""

from types import SimpleNamespace

import pytest
import torch

from job.core.errors import CannotFitError, SickDeviceError
from job.tune.device import device
from job.tune.device import random_state as generators
from job.tune.device.device import allocation_retries, choose_device, driver_version, gpu_bus_id, gpu_uuid
from job.tune.device.failures import hardware_failure
from job.tune.device.random_state import random_state, restore_random_state

SUFFIX = (
    "\nSearch for `cudaError' in https://docs.nvidia.com/cuda/ for more information.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
HARDWARE = {
    46: "CUDA-capable device(s) is/are busy or unavailable",
    100: "no CUDA-capable device is detected",
    102: "device doesn't have valid Grid license",
    103: "integrity checks failed",
    214: "uncorrectable ECC error encountered",
    220: "uncorrectable NVLink error detected during the execution",
    226: "Invalid access of peer GPU memory over nvlink or a hardware error",
    802: "system not yet initialized",
    803: "system has unsupported display driver / cuda driver combination",
    804: "forward compatibility was attempted on non supported HW",
    805: "MPS client failed to connect to the MPS control daemon or the MPS server",
    806: "the remote procedural call between the MPS server and the MPS client failed",
    807: "MPS server is not ready to accept new MPS client requests",
    808: "the hardware resources required to create MPS client have been exhausted",
    810: "the MPS client has been terminated by the server",
    34: "CUDA driver is a stub library",
    35: "CUDA driver version is insufficient for CUDA runtime version",
}
"""CUDA's own code -> text, where the GPU, its driver or its node is to blame."""
SOFTWARE = {
    1: "invalid argument",
    2: "out of memory",
    98: "invalid device function",
    101: "invalid device ordinal",
    201: "invalid device context",
    209: "no kernel image is available for execution on the device",
    700: "an illegal memory access was encountered",
    701: "too many resources requested for launch",
    702: "the launch timed out and was terminated",
    710: "device-side assert triggered",
    714: "hardware stack error",
    715: "an illegal instruction was encountered",
    716: "misaligned address",
    718: "invalid program counter",
    719: "unspecified launch failure",
    999: "unknown error",
}
"""Where a wrong kernel is the likelier cause; 714 has the word hardware in it and is a kernel's call stack."""


def accelerator_error(text, code):
    """As torch raises it: the code beside the text."""
    error = torch.AcceleratorError(f"CUDA error: {text}{SUFFIX}")
    error.error_code = code
    return error


def raised(error, *, cause=None, during=None):
    """The error as it arrives after it was raised from, or while handling, another."""
    try:
        try:
            if during is not None:
                raise during
        finally:
            raise error from cause
    except BaseException as caught:  # noqa: BLE001 - any
        return caught


# --- which failures are the hardware's -------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "text"), HARDWARE.items())
def test_an_error_that_names_the_hardware_is_its_own(code, text):
    """By the code; by the text where an older torch, or Triton, gives no code."""
    said, _, named = hardware_failure(accelerator_error(text, code)).partition(" (CUDA error ")

    assert named == f"{code})"
    assert hardware_failure(accelerator_error("words of another version", code)).startswith(said)
    assert hardware_failure(RuntimeError(f"CUDA error: {text}{SUFFIX}")) == said
    assert hardware_failure(RuntimeError(f"Triton Error [CUDA]: {text}")) == said


@pytest.mark.parametrize(("code", "text"), SOFTWARE.items())
def test_an_error_that_a_wrong_kernel_causes_is_not(code, text):
    assert hardware_failure(accelerator_error(text, code)) is None
    assert hardware_failure(RuntimeError(f"CUDA error: {text}{SUFFIX}")) is None
    assert hardware_failure(accelerator_error("uncorrectable ECC error encountered", code)) is None


@pytest.mark.parametrize(
    "text",
    [
        "Unable to determine the device handle for GPU0000:1B:00.0: GPU is lost. Reboot the system to recover this GPU",
        "NVRM: GPU at PCI:0000:1b:00: GPU has fallen off the bus.",
        "NVML: GPU requires reset",
        "Vulkan: VK_ERROR: device lost",
        "NVRM: Xid (PCI:0000:65:00): 48, pid=17, Double Bit ECC Error",
        "the driver's log says Xid 95",
    ],
)
def test_a_gpu_that_is_gone_is_named_by_its_text(text):
    assert hardware_failure(RuntimeError(text)) is not None


@pytest.mark.parametrize(
    "error",
    [
        ValueError('train.jsonl:7: "uncorrectable ECC error encountered" is no answer'),
        KeyError("GPU is lost"),
        MemoryError(),
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139 GiB"
        ),
        RuntimeError("NVRM: Xid (PCI:0000:65:00): 31, pid=17, MMU Fault"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_not_whatever_words_they_quote(error):
    assert hardware_failure(error) is None


def test_the_hardware_behind_another_error_is_found():
    ecc = accelerator_error("uncorrectable ECC error encountered", 214)

    assert "ECC" in hardware_failure(raised(KeyError("while cleaning up"), during=ecc))
    assert "ECC" in hardware_failure(raised(OSError("loading failed"), cause=ecc))


def test_errors_that_cause_each_other_in_a_circle_come_to_an_end():
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one

    assert hardware_failure(one) is None


# --- which device is taken -------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """A torch with CUDA whose start, GPU and driver can be set."""
    state = SimpleNamespace(error=None, bf16=True, driver=tmp_path / "version")

    def init():
        if state.error is not None:
            raise state.error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.error is None)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: state.bf16)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device, "_DRIVER_VERSION", state.driver)
    return state


def test_a_usable_gpu_is_taken(cuda):
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")


def test_a_gpu_without_bf16_cannot_run_it(cuda):
    cuda.bf16 = False

    with pytest.raises(CannotFitError, match="Tesla T4 has no bf16"):
        choose_device("cuda")


TOO_OLD = RuntimeError(
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (b@c)\n", "570.86.15"),
        (None, "(version not known)"),
    ],
)
def test_a_driver_that_is_too_old_is_named_in_one_line_with_all_three_versions(cuda, version, told):
    cuda.error = TOO_OLD
    if version is not None:
        cuda.driver.write_text(version + "GCC version:  gcc version 12.2.0\n")

    with pytest.raises(SickDeviceError) as caught:
        choose_device("cuda")

    assert str(caught.value) == (
        f"no GPU can be used: driver {told} supports CUDA up to 12.2, torch needs 13.0; start the job on another node, "
        "or take the image for older drivers"
    )
    assert driver_version() == (told if version is not None else None)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("No CUDA GPUs are available"), "No CUDA GPUs are available"),
        (RuntimeError("Found no NVIDIA driver on your system. Please check that\nmore"), "Found no NVIDIA driver"),
        (AssertionError("Torch not compiled with CUDA enabled"), "Torch not compiled with CUDA enabled"),
        (
            RuntimeError("Unexpected error from cudaGetDeviceCount(). [...] Error 802: system not yet initialized"),
            "the node's GPU services are not up (fabric manager);",
        ),
        (torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization"), "CUDA call failed lazily"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_gpu_that_cannot_be_used_says_why(cuda, error, told):
    cuda.error = error

    with pytest.raises(SickDeviceError) as caught:
        choose_device("cuda")

    assert "no GPU is visible to this process (--device cuda): " + told in str(caught.value)
    assert str(caught.value).endswith("or start the job on another node")
    assert "\n" not in str(caught.value)
    assert choose_device("auto") == torch.device("cpu")


# --- how others know it ----------------------------------------------------------------------------------------------


def test_a_gpu_is_named_for_those_who_count_in_another_order(monkeypatch):
    about = SimpleNamespace(
        uuid="bd2f0a5c-6f1e-4e6a-9d6f-0c8a5a3f7b11", pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: about)
    gpu = torch.device("cuda", 0)

    assert gpu_uuid(gpu) == "bd2f0a5c-6f1e-4e6a-9d6f-0c8a5a3f7b11"
    assert gpu_bus_id(gpu) == "0000:1b:00.0"
    del about.pci_bus_id
    assert gpu_bus_id(gpu) is None
    assert gpu_uuid(torch.device("cpu")) is gpu_bus_id(torch.device("cpu")) is None


def test_asking_for_memory_anew_is_counted_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _device: {"num_alloc_retries": 3})

    assert allocation_retries(torch.device("cuda", 0)) == 3
    assert allocation_retries(torch.device("cpu")) == 0


def test_the_generators_of_host_and_gpu_are_put_back_together(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_to.append)
    assert random_state().keys() == {"torch"}  # a GPU that is only visible is left alone
    monkeypatch.setattr(generators, "cuda_in_use", lambda: True)
    before = random_state()
    drawn = torch.rand(3)
    restore_random_state(before)

    assert torch.equal(torch.rand(3), drawn)
    assert [int(state) for state in set_to] == [7]
    monkeypatch.setattr(generators, "cuda_in_use", lambda: False)
    restore_random_state(before)  # a checkpoint of a GPU, resumed on the CPU
    assert len(set_to) == 1
