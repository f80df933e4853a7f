"""Before anything is downloaded: is this device the one we were promised, is it free, and does it compute right?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from job.core.errors import CannotFitError, SickDeviceError
from job.core.plan.memory import GIB, NF4_BLOCK, ComputeDtype
from job.tune.device.compute_dtype import compute_dtype, dtype_name
from job.tune.device.device import device_name, driver_version
from job.tune.device.failures import reason_of
from job.tune.model.four_bit import four_bit

_LEAST_CAPABILITY = (7, 5)
"""Compute capability that the 4-bit kernels need."""
_NO_KERNEL = 209
"""CUDA's code for a program that was built for other GPUs."""
_NEARLY_NOTHING = 0.05
"""Share of the GPU's memory: with less than this free no base fits, and this process did not take it."""
_MUCH_TAKEN = 0.10
"""Share of the GPU's memory: with more than this taken a warning is due; what CUDA takes for itself is well below."""
_WIDTH = 256
"""Terms of the test's sums: with factors of 1 and -1 all partial sums are whole numbers up to 256, which bf16 holds."""
_SIZES = {"cuda": 2048, "cpu": 512}
"""Rows of the test's matrices: enough that every part of a large GPU computes some of the product."""
_ROWS = 64
"""Rows that the 4-bit product is tried with."""
_ROUNDING = 2.0**-8
"""Rounding to bf16, as a share of the number."""
_FOUR_BIT_TOLERANCE = 8 * _ROUNDING
"""How far an output in 4 bits may be off, as a share of its size, both as root mean squares over random rows.

No term is off by more than its roundings to bf16 (the code, the scale, their product, that times the row, the sum: 5)
and the scale's to 8 bits (at most 1/128 here: 2), and one more for what these do together; a sum over random rows is
off by no larger share than its terms. On the CPU a quarter of it is seen; one code of 256 that is 0 instead of 1 is
three times as much.
"""
_CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The sixteen values of NF4 (QLoRA, appendix E): known here, so that the library is not its own judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What we compute on, for the log and the report; None on the CPU, or where the system does not say."""

    name: str
    count: int
    """GPUs that this process sees; it uses the first."""
    capability: str | None
    total_bytes: int | None
    free_bytes: int | None
    """Free memory of the GPU before the base is loaded."""
    compute_dtype: ComputeDtype
    """What the base computes in."""
    driver: str | None
    cuda: str | None
    """CUDA version that torch is built for; None: a torch without CUDA."""
    torch: str
    warnings: tuple[str, ...]
    """Sentences for the log and the report."""


def look_at_device(device: torch.device, *, held_by: str | None = None) -> DeviceFacts:
    """Look at the device, and multiply two matrices on it whose product is known; random generators are left alone.

    Args:
        device: from `choose_device`.
        held_by: who else is on the GPU; None: not known.

    Raises:
        SickDeviceError: another process has nearly all of its memory, it fails, or it computes wrongly.
        CannotFitError: it is older or newer than the kernels are built for.
    """
    name = device_name(device)
    if device.type != "cuda":
        _check_products(device, name)
        return DeviceFacts(
            name=name,
            count=0,
            capability=None,
            total_bytes=None,
            free_bytes=None,
            compute_dtype=dtype_name(compute_dtype(device)),
            driver=driver_version(),
            cuda=torch.version.cuda,
            torch=torch.__version__,
            warnings=(),
        )
    with _translated(name):
        capability = torch.cuda.get_device_capability(device)
        _refuse_old(name, capability)
        free, total = torch.cuda.mem_get_info(device)
        _refuse_taken(name, free, total, held_by)
        _check_products(device, name)
        torch.cuda.empty_cache()  # the plan counts what is free
    return DeviceFacts(
        name=name,
        count=torch.cuda.device_count(),
        capability="{}.{}".format(*capability),
        total_bytes=total,
        free_bytes=free,
        compute_dtype=dtype_name(compute_dtype(device)),
        driver=driver_version(),
        cuda=torch.version.cuda,
        torch=torch.__version__,
        warnings=tuple(_warnings(name, device, free, total, held_by)),
    )


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Translate CUDA's errors: the recipe has no part in this, so the device or the installation is at fault."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SickDeviceError(
            f"{name}: no memory for a matrix of {_SIZES['cuda']} rows; another process took it meanwhile: end it, or "
            "start the job on another node"
        ) from error
    except RuntimeError as error:
        if getattr(error, "error_code", None) == _NO_KERNEL or "no kernel image is available" in str(error):
            raise CannotFitError(
                f"{name}: torch {torch.__version__} has no kernels for it (built for "
                f"{' '.join(torch.cuda.get_arch_list())}); use another GPU, or an image built for this one"
            ) from error
        raise SickDeviceError(
            f"{name}: {reason_of(error)}; start the job on another node and have this one looked at"
        ) from error


def _refuse_old(name: str, capability: tuple[int, int]) -> None:
    if capability < _LEAST_CAPABILITY:
        raise CannotFitError(
            f"{name}: compute capability {capability[0]}.{capability[1]}, and the 4-bit kernels need "
            f"{_LEAST_CAPABILITY[0]}.{_LEAST_CAPABILITY[1]}; use an Ampere GPU or newer (A10, A100, L4, H100, ...)"
        )


def _refuse_taken(name: str, free: int, total: int, held_by: str | None) -> None:
    if free < _NEARLY_NOTHING * total:
        raise SickDeviceError(f"{_free(name, free, total, held_by)}: end them, or start the job on another node")


def _free(name: str, free: int, total: int, held_by: str | None) -> str:
    holders = held_by or "the driver does not say who"
    return f"{name}: {free / GIB:.1f} of {total / GIB:.1f} GiB are free; others hold the rest ({holders})"


def _warnings(name: str, device: torch.device, free: int, total: int, held_by: str | None) -> Iterator[str]:
    count = torch.cuda.device_count()
    if count > 1:
        yield f"{count} GPUs are visible and one is used (number {device.index}, {name}); ask the scheduler for one"
    if total - free > _MUCH_TAKEN * total:
        yield f"{_free(name, free, total, held_by)} and may take more"


def _check_products(device: torch.device, name: str) -> None:
    """Compare two products with the CPU's in fp64: one that has no rounding at all, one through the 4-bit kernels.

    In fp64, so that a processor that computes in fp32 is not its own judge.
    """
    generator = torch.Generator().manual_seed(0)
    size = _SIZES[device.type]
    left, right = _signs(size, generator), _signs(size, generator)
    dtype = compute_dtype(device)
    product = left.to(device, dtype) @ right.to(device, dtype).T
    wrong = int((product.double().cpu() != left.double() @ right.double().T).sum())
    if wrong:
        raise _computes_wrong(
            name, f"{wrong:,} of {product.numel():,} numbers of a product in {dtype_name(dtype)} are wrong"
        )
    weight = _four_bit_weight(size, generator)
    multiply = four_bit(weight.to(device, dtype))
    rows = torch.randn(_ROWS, _WIDTH, generator=generator).to(dtype)
    for count in (1, _ROWS):  # two kernels: one row, as in generating, and many, as in training
        product = torch.cat([multiply(part) for part in torch.split(rows.to(device), count)])
        off = _largest_difference(product.double().cpu(), rows.double() @ weight.double().T)
        if not off <= _FOUR_BIT_TOLERANCE:  # so that NaN fails too
            raise _computes_wrong(name, f"a 4-bit product of {count} rows is off by {off:.3f} of itself")


def _signs(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (rows, _WIDTH), generator=generator) * 2.0 - 1.0


def _four_bit_weight(rows: int, generator: torch.Generator) -> Tensor:
    """A weight that 4 bits hold as it is, but for its blocks' scales: [rows, _WIDTH] fp32."""
    blocks = rows * _WIDTH // NF4_BLOCK
    codes = torch.tensor(_CODES)[torch.randint(0, len(_CODES), (blocks, NF4_BLOCK), generator=generator)]
    codes[:, 0] = 1.0  # the largest of a block is its scale
    scales = (0.5 + torch.rand(blocks, 1, generator=generator)).bfloat16().float()  # held exactly, whatever computes
    return (codes * scales).view(rows, _WIDTH)


def _largest_difference(product: Tensor, expected: Tensor) -> float:
    """Relative difference of the output that is furthest off; both are [_ROWS, outputs]."""
    return float(((product - expected).norm(dim=0) / expected.norm(dim=0)).max())


def _computes_wrong(name: str, what: str) -> SickDeviceError:
    return SickDeviceError(
        f"{name} computes wrongly: {what} (compared with the CPU); start the job on another node and have this one "
        "looked at"
    )
