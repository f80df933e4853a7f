"""The device we compute on: which one, how much of its memory is free, how much was used."""

import gc
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from job.core.errors import CannotFitError, SickDeviceError
from job.core.plan.memory import DeviceMemory
from job.tune.device.compute_dtype import compute_dtype, dtype_name
from job.tune.device.failures import reason_of

_DRIVER_VERSION = Path("/proc/driver/nvidia/version")


def choose_device(wanted: str) -> torch.device:
    """`auto`, `cuda` or `cpu` -> the device.

    Raises:
        SickDeviceError: a GPU is asked for, and none can be used; the message says why.
        CannotFitError: the GPU has no bf16.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    _start_cuda()
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise CannotFitError(
            f"{torch.cuda.get_device_name()} has no bf16; use an Ampere GPU or newer (A10, A100, L4, H100, ...)"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _start_cuda() -> None:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call] # torch has no types here
    except Exception as error:  # RuntimeError, AssertionError, or a class of its own around any of them
        if (old := _too_old_driver(error)) is not None:
            raise SickDeviceError(
                f"no GPU can be used: {old}; start the job on another node, or take the image for older drivers"
            ) from error
        raise SickDeviceError(
            f"no GPU is visible to this process (--device cuda): {reason_of(error)}; look at the driver and at what "
            "the scheduler gave us, or start the job on another node"
        ) from error


def _too_old_driver(error: Exception) -> str | None:
    """What the driver supports and torch needs, where torch says that the driver is too old; else None."""
    found = re.search(r"driver on your system is too old \(found version (\d+)\)", str(error))
    if found is None:
        return None
    newest = f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}"
    driver = driver_version() or "(version not known)"
    return f"driver {driver} supports CUDA up to {newest}, torch needs {torch.version.cuda}"


def driver_version() -> str | None:
    """Version of the NVIDIA driver that this kernel runs; None where there is none."""
    try:
        text = _DRIVER_VERSION.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else None


@contextmanager
def on_own_stream(device: torch.device) -> Iterator[None]:
    """Meanwhile a GPU's work goes by a stream that waits for no other: what is read must be done already."""
    with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():  # type: ignore[no-untyped-call] # torch has no types here
        yield


def cuda_in_use() -> bool:
    """Whether this process computes on a GPU; one that is only visible is left alone."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call] # torch has no types here


def device_name(device: torch.device) -> str:
    """The kind of device, as it stands in the report."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def release_memory(device: torch.device) -> None:
    """Give memory back that nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def begin_peak_anew(device: torch.device) -> None:
    """What was allocated on a GPU before counts no more; on the CPU it does."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def gpu_uuid(device: torch.device) -> str | None:
    """The GPU's own name for itself, without a prefix; None on the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def gpu_bus_id(device: torch.device) -> str | None:
    """Where the GPU sits in the machine, as `0000:1b:00.0`; None on the CPU, or where torch does not say."""
    if device.type != "cuda":
        return None
    about: Any = torch.cuda.get_device_properties(device)
    if not hasattr(about, "pci_bus_id"):
        return None
    return f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"


def device_memory(device: torch.device) -> DeviceMemory:
    """The device's memory that is free now."""
    if device.type != "cuda":
        return DeviceMemory(
            kind="cpu", name=device_name(device), free_bytes=0, compute_dtype=dtype_name(compute_dtype(device))
        )
    return DeviceMemory(kind="cuda", name=device_name(device), free_bytes=torch.cuda.mem_get_info(device)[0])


def allocation_retries(device: torch.device) -> int:
    """How often this process had to give its free memory back and ask for it anew; 0 on the CPU.

    Each waits for the GPU: memory that is nearly full and in pieces costs time long before it runs out.
    """
    if device.type == "cpu":
        return 0
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes that were allocated on the GPU, or resident on the CPU, since the process began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
