"""The device we compute on: which one, how much memory is free, how much was used."""

import resource
import sys

import torch

from job.core.errors import CannotFitError, SickDeviceError
from job.core.plan import DeviceMemory


def choose_device(wanted: str) -> torch.device:
    """`auto`, `cuda` or `cpu` -> the device.

    Raises:
        SickDeviceError: a GPU is asked for, and none is visible.
        CannotFitError: the GPU has no bf16.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SickDeviceError(
            "no GPU is visible to this process (--device cuda); look at the driver and at what the scheduler gave us, "
            "or start the job on another node"
        )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise CannotFitError(
            f"{torch.cuda.get_device_name()} has no bf16; use an Ampere GPU or newer (A10, A100, L4, H100, ...)"
        )
    return torch.device("cuda", torch.cuda.current_device())


def cuda_in_use() -> bool:
    """Whether this process computes on a GPU; one that is only visible is left alone."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call] # torch has no types here


def device_name(device: torch.device) -> str:
    """The kind of device, as it stands in the report."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def device_memory(device: torch.device) -> DeviceMemory:
    """What is free now."""
    if device.type != "cuda":
        return DeviceMemory(kind="cpu", free_bytes=0)
    return DeviceMemory(kind="cuda", free_bytes=torch.cuda.mem_get_info(device)[0])


def peak_memory_bytes(device: torch.device) -> int:
    """Most that was allocated on the GPU, or resident on the CPU, since the process began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
