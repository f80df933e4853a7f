"""The device we compute on: which one, how much memory is free, how much was used, and what names it as broken."""

import re
import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.core.errors import CannotFitError, SickDeviceError
from job.core.memory import DeviceMemory

_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_LONGEST_REASON = 200


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
    """Who supports what, when torch says that the driver is older than it needs."""
    found = re.search(r"driver on your system is too old \(found version (\d+)\)", str(error))
    if found is None:
        return None
    newest = f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}"
    driver = driver_version() or "(version not known)"
    return f"driver {driver} supports CUDA up to {newest}, torch needs {torch.version.cuda}"


def reason_of(error: Exception) -> str:
    """What CUDA or torch refused, in one line: torch's own texts go on with advice for people at a desk."""
    said = hardware_failure(error)
    if said is not None:
        return said
    first = str(error).strip().splitlines()[:1]
    return first[0][:_LONGEST_REASON].rstrip(".") if first else type(error).__name__


def told(error: Exception) -> str:
    """What any library refused: the error's kind and text, no longer than a line of a log should be."""
    return f"{type(error).__name__}: {error}"[:_LONGEST_REASON]


def driver_version() -> str | None:
    """Of the NVIDIA driver that this kernel runs; None where there is none."""
    try:
        text = _DRIVER_VERSION.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else None


def cuda_in_use() -> bool:
    """Whether this process computes on a GPU; one that is only visible is left alone."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call] # torch has no types here


def random_state() -> dict[str, Tensor]:
    """Torch's generators as they stand: the host's, and the GPU's where one is in use. Waits for no GPU."""
    state = {"torch": torch.get_rng_state()}
    if cuda_in_use():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    """Put them back; a GPU's is left out where none is in use."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and cuda_in_use():
        torch.cuda.set_rng_state(state["cuda"])


def device_name(device: torch.device) -> str:
    """The kind of device, as it stands in the report."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


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
    """What is free now."""
    if device.type != "cuda":
        return DeviceMemory(kind="cpu", free_bytes=0)
    return DeviceMemory(kind="cuda", free_bytes=torch.cuda.mem_get_info(device)[0])


def allocation_retries(device: torch.device) -> int:
    """How often this process had to give its free memory back and ask for it anew; 0 on the CPU.

    Each waits for the GPU: memory that is nearly full and in pieces costs time long before it runs out.
    """
    if device.type == "cpu":
        return 0
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def peak_memory_bytes(device: torch.device) -> int:
    """Most that was allocated on the GPU, or resident on the CPU, since the process began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_HARDWARE: dict[int, tuple[str, str]] = {
    34: ("driver is a stub library", "the driver's library is a stub: the node's own is not mounted"),
    35: ("driver version is insufficient", "the driver is older than this CUDA needs"),
    46: ("device(s) is/are busy or unavailable", "the GPU is busy or unavailable: another process holds it for itself"),
    100: ("no cuda-capable device is detected", "no GPU is there any more"),
    102: ("valid grid license", "the virtual GPU has no licence"),
    103: ("integrity checks failed", "the GPU or its driver failed CUDA's own self-test"),
    214: ("uncorrectable ecc error", "uncorrectable memory error (ECC)"),
    220: ("uncorrectable nvlink error", "uncorrectable NVLink error"),
    226: ("or a hardware error", "the GPU contained a hardware error"),
    802: ("system not yet initialized", "the node's GPU services are not up (fabric manager)"),
    803: ("unsupported display driver / cuda driver", "the driver was changed without a restart of the node"),
    804: (
        "forward compatibility was attempted",
        "the driver is older than this CUDA needs, and the GPU forbids a bridge",
    ),
    **dict.fromkeys(range(805, 811), ("mps client", "the node's MPS server refused or ended this process")),
}
"""CUDA's error code -> words of its text, in small letters, and what it means to whoever runs the node.

Not here, since a wrong kernel causes them far more often than a broken GPU: 700 illegal address, 702 launch time-out (a
screen's watchdog), 714 hardware stack error (by name only: it is a kernel's call stack), 715 to 718 illegal
instruction and its kin, 719 unspecified launch failure, 201 invalid context, 999 unknown. After one of these the GPU's
own counters tell whether it is broken: job.edge.gpu.
"""
_LOST = (
    ("gpu is lost", "the GPU is lost"),
    ("fallen off the bus", "the GPU has fallen off the bus"),
    ("fell off the bus", "the GPU has fallen off the bus"),
    ("gpu requires reset", "the GPU needs a reset"),
    ("gpu requires restart", "the GPU needs a reset"),
    ("device lost", "the GPU is lost"),
)
"""Without a code of CUDA's: what the driver's management library says, and others quote."""
_XID = re.compile(r"\bxid(?: \(pci:[0-9a-f:.]+\))?:? *(\d+)", re.IGNORECASE)
_HARDWARE_XIDS = {48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140}
"""The driver's own numbers: memory errors (48, 63, 64, 92, 94, 95, 140), links and bus (74, 79), the GPU's own
processors (62, 119, 120). Others (13, 31, 43, 45, 69) are mostly a program's doing."""


def hardware_failure(error: BaseException) -> str | None:
    """What is broken, when an error names the GPU, its driver or its node rather than the program; else None.

    A CUDA error's code decides where there is one, its text otherwise. What caused an error, or was being handled when
    it came, counts as well.
    """
    for each in _chain(error):
        if isinstance(each, RuntimeError):  # torch's, and Triton's: an example that quotes such words is none
            said = _by_code(each) if isinstance(getattr(each, "error_code", None), int) else _by_text(each)
            if said is not None:
                return said
    return None


def _by_code(error: BaseException) -> str | None:
    code: int = error.error_code  # type: ignore[attr-defined] # torch sets it on what CUDA refused
    return f"{_HARDWARE[code][1]} (CUDA error {code})" if code in _HARDWARE else None


def _by_text(error: BaseException) -> str | None:
    text = str(error).lower()
    if (xid := _XID.search(text)) and int(xid[1]) in _HARDWARE_XIDS:
        return f"the driver reports a hardware error (Xid {xid[1]})"
    return next((said for words, said in (*_HARDWARE.values(), *_LOST) if words in text), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
