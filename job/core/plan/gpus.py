"""What is known of kinds of GPUs before one is at hand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from job.core.close_names import did_you_mean
from job.core.errors import CannotFitError, UsageError
from job.core.plan.links import (
    NVLINK_3,
    NVLINK_4,
    NVLINK_5,
    PCIE_4,
    PCIE_4_BY_HOST,
    PCIE_5,
    PCIE_5_BY_HOST,
    Link,
)

_Generation = Literal["hopper", "blackwell", "ada", "ampere"]
_SUSTAINED_SHARE = 0.8
"""Of the vendor's dense bf16 figure, where power does not set the limit: an A100 keeps up about this."""
_TFLOPS_PER_WATT: dict[_Generation, float] = {"hopper": 1.3, "blackwell": 1.3, "ada": 0.7, "ampere": 0.7}
"""What a board's power lets its tensor cores keep up, by generation: an L4 of 72 W stays far below its peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What sets the pace of a kind of GPU; figures are the vendor's, but for the measured one."""

    generation: _Generation
    dense_tflops: float
    """bf16, dense, sums in fp32."""
    watts: float
    """Of the board."""
    bytes_per_second: float
    """Of its memory."""
    measured_tflops: float | None = None
    """Large bf16 products one after the other, as bench/ measures them; None: derived from the other figures."""

    @property
    def sustained_flops(self) -> float:
        """Floating-point operations a second that large bf16 products keep up."""
        limit = min(_SUSTAINED_SHARE * self.dense_tflops, _TFLOPS_PER_WATT[self.generation] * self.watts)
        return (self.measured_tflops or limit) * 1e12

    @property
    def source(self) -> Literal["measured", "derived"]:
        """Where the pace is from."""
        return "derived" if self.measured_tflops is None else "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A kind of GPU."""

    name: str
    memory_gib: float
    """All of it, as CUDA reports it."""
    speed: Speed | None
    """None: not known, so no time is forecast."""
    link: Link | None
    """To others of its kind in the same host, as they are usually built; None: not known, as its speed."""
    driver_name: str | None = None
    """The whole of what its driver calls it: a part of a card (MIG), and cards of other power, have longer names."""


def _gpu(
    name: str,
    driver_name: str,
    memory_gib: float,
    generation: _Generation,
    *figures: float,
    link: Link,
    measured: float | None = None,
) -> Gpu:
    """With its dense TFLOP/s, watts and GB/s."""
    tflops, watts, gigabytes = figures
    speed = Speed(
        generation=generation,
        dense_tflops=tflops,
        watts=watts,
        bytes_per_second=gigabytes * 1e9,
        measured_tflops=measured,
    )
    return Gpu(name=name, memory_gib=memory_gib, speed=speed, link=link, driver_name=driver_name)


GPUS = (
    _gpu("h200", "NVIDIA H200", 139.8, "hopper", 989, 700, 4800, link=NVLINK_4, measured=685),
    _gpu("b200", "NVIDIA B200", 178.4, "blackwell", 2250, 1000, 8000, link=NVLINK_5),
    _gpu("h100", "NVIDIA H100 80GB HBM3", 79.2, "hopper", 989, 700, 3350, link=NVLINK_4, measured=706),
    _gpu("h100-pcie", "NVIDIA H100 PCIe", 79.2, "hopper", 756, 350, 2000, link=PCIE_5),
    _gpu("a100", "NVIDIA A100-SXM4-80GB", 79.2, "ampere", 312, 400, 2039, link=NVLINK_3),
    _gpu("a100-40", "NVIDIA A100-SXM4-40GB", 39.4, "ampere", 312, 400, 1555, link=NVLINK_3),
    _gpu("l40s", "NVIDIA L40S", 44.4, "ada", 362, 350, 864, link=PCIE_4),
    _gpu("a6000", "NVIDIA RTX A6000", 47.4, "ampere", 155, 300, 768, link=PCIE_4),
    _gpu("rtx5090", "NVIDIA GeForce RTX 5090", 31.4, "blackwell", 209, 575, 1792, link=PCIE_5_BY_HOST),
    _gpu("rtx4090", "NVIDIA GeForce RTX 4090", 23.5, "ada", 165, 450, 1008, link=PCIE_4_BY_HOST),
    _gpu("rtx3090", "NVIDIA GeForce RTX 3090", 23.6, "ampere", 71, 350, 936, link=PCIE_4_BY_HOST),
    _gpu("a10g", "NVIDIA A10G", 22.1, "ampere", 70, 300, 600, link=PCIE_4),
    _gpu("l4", "NVIDIA L4", 22.1, "ada", 121, 72, 300, link=PCIE_4),
)
_WITHOUT_BF16 = ("v100", "t4", "p100", "p40", "rtx2080")
_WITHOUT_CUDA = ("mi", "gaudi", "tpu", "trn", "trainium", "max1550")
"""How the names of accelerators begin that are no NVIDIA GPUs."""


def gpu_named(name: str, *, memory_gib: float | None = None) -> Gpu:
    """A kind by its name; with another memory, as a part of a card has it.

    Raises:
        UsageError: not known.
        CannotFitError: it has no bf16, or no CUDA.
    """
    if name.startswith(_WITHOUT_CUDA):
        raise CannotFitError(
            f"{name} is no NVIDIA GPU: the 4-bit weights are dequantised by CUDA code alone; use an NVIDIA GPU of "
            "the Ampere generation or newer (A10G, A100, L4, H100, ...)"
        )
    if name in _WITHOUT_BF16:
        raise CannotFitError(
            f"{name} has no bf16, and the base would be computed in fp16, which overflows in about one of five 7B "
            "runs; use an Ampere GPU or newer (A10G, A100, L4, H100, ...)"
        )
    found = next((gpu for gpu in GPUS if gpu.name == name), None)
    if found is None:
        known = ", ".join(gpu.name for gpu in GPUS)
        meant = did_you_mean(name, [gpu.name for gpu in GPUS])
        raise UsageError(f"--gpu {name}: not known; one of {known}, or --gpu-memory GIB for another one{meant}")
    if memory_gib is None:
        return found
    return replace(found, memory_gib=memory_gib)


def gpu_called(driver_name: str) -> Gpu | None:
    """The kind that a driver gives this name; None: not known, as a part of a card is not."""
    return next((gpu for gpu in GPUS if gpu.driver_name == driver_name), None)


def gpus_of(names: Sequence[str], *, memory_gib: float | None) -> list[Gpu]:
    """The named ones, one by its memory alone, or all that are known.

    Raises:
        UsageError: not known.
        CannotFitError: one has no bf16, or no CUDA.
    """
    named = [gpu_named(name, memory_gib=memory_gib) for name in dict.fromkeys(names)]
    if named:
        return named
    return [*GPUS] if memory_gib is None else [Gpu(name="your GPU", memory_gib=memory_gib, speed=None, link=None)]
