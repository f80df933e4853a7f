"""What a device computes in: bf16 where it has instructions for it, else fp32."""

from typing import Any

import torch

from job.core.plan.memory import ComputeDtype

_DTYPES: dict[ComputeDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Never fp16, which overflows in about one of five 7B runs (QLoRA's own README)."""
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""Any of these multiplies in bf16; the last one is ARM's."""


def compute_dtype(device: torch.device) -> torch.dtype:
    """What the base computes in on this device; its weights are in 4 bits on each.

    On a processor that has no such instructions a product in bf16 takes 7 to 70 times as long as one in fp32.
    """
    # A GPU without bf16 is refused where the device is chosen.
    return torch.bfloat16 if device.type == "cuda" or processor_multiplies_bf16() else torch.float32


def processor_multiplies_bf16() -> bool:
    """Whether this processor has the instructions, and oneDNN may use them (`ONEDNN_MAX_CPU_ISA` can forbid it)."""
    found = torch.cpu.get_capabilities()
    onednn = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call] # torch has no types here
    if not onednn or not any(found.get(name) for name in _BF16_INSTRUCTIONS):
        return False
    # Alone it would not do: oneDNN also says yes where AVX-512 has no bf16 and it converts each number.
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - torch has no other word for it


def dtype_name(dtype: torch.dtype) -> ComputeDtype:
    """A dtype from `compute_dtype`, as plan, checkpoint and report call it."""
    return next(name for name, known in _DTYPES.items() if known is dtype)


def dtype_of(model: Any) -> torch.dtype:
    """What a base, or an adapted one, computes in: what is not in 4 bits is held in it."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype
