"""Which implementation of the ops a device runs: Triton's kernels or the reference."""

import importlib.util
from functools import cache

import torch

from job.kernels import reference
from job.kernels.ops import Ops


def ops_of(device: torch.device) -> Ops:
    """Triton's kernels on a GPU where Triton is installed, else the reference."""
    return _kernels_or_reference(device.type)


@cache
def _kernels_or_reference(kind: str) -> Ops:
    if kind != "cuda" or not has_triton():
        return reference
    from job.kernels import triton_elementwise as kernels

    return kernels


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
