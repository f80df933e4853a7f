"""What is known of kinds of GPUs before one is at hand."""

from dataclasses import dataclass

from job.core.close_names import did_you_mean
from job.core.errors import CannotFitError, UsageError

_SUSTAINED_SHARE = 0.693
"""The share of the vendor's dense bf16 figure: 685 of 989 TFLOP/s, large products one after the other on an H200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A kind of GPU."""

    name: str
    memory_gib: float
    """All of it, as CUDA reports it."""
    dense_tflops: float | None
    """bf16, dense, from the vendor's data sheet; None: not known, so no time is forecast."""

    @property
    def sustained_flops(self) -> float | None:
        """Floating-point operations a second that large bf16 products keep up."""
        return None if self.dense_tflops is None else _SUSTAINED_SHARE * self.dense_tflops * 1e12


GPUS = (
    Gpu(name="h200", memory_gib=139.8, dense_tflops=989),
    Gpu(name="b200", memory_gib=178.4, dense_tflops=2250),
    Gpu(name="h100", memory_gib=79.2, dense_tflops=989),
    Gpu(name="h100-pcie", memory_gib=79.2, dense_tflops=756),
    Gpu(name="a100", memory_gib=79.2, dense_tflops=312),
    Gpu(name="a100-40", memory_gib=39.4, dense_tflops=312),
    Gpu(name="l40s", memory_gib=44.4, dense_tflops=362),
    Gpu(name="a6000", memory_gib=47.4, dense_tflops=155),
    Gpu(name="rtx4090", memory_gib=23.5, dense_tflops=165),
    Gpu(name="a10g", memory_gib=22.1, dense_tflops=70),
    Gpu(name="l4", memory_gib=22.1, dense_tflops=121),
)
_WITHOUT_BF16 = ("v100", "t4", "p100", "p40", "rtx2080")


def gpu_named(name: str, *, memory_gib: float | None = None) -> Gpu:
    """A kind by its name; with another memory, as a part of a card has it.

    Raises:
        UsageError: not known.
        CannotFitError: it has no bf16.
    """
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
    return Gpu(name=name, memory_gib=memory_gib, dense_tflops=found.dense_tflops)
