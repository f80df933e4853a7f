"""Experts in MXFP4, decoded exactly as they are read: a tensor of the model in the place of its blocks and scales."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.core.base.mxfp4 import BLOCKS, SCALES, in_mxfp4, is_mxfp4
from job.core.base.promises import TensorHeader
from job.tune.model.stored.tensor_files import StoredTensor, is_finite

PUBLISHED = "published_quantization_config"
"""Where the config of a copy in 4 bits says how the base is quantised that it was made from."""
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the four bits stand for, the first of them being the sign (OCP Microscaling Formats 1.0, section 5.3.3)."""
_MANTISSA_BITS = 23
_HALF_OF_LEAST = 0x00400000
"""2^-127 in fp32, which has no number with that exponent but one below its least."""


def is_published_in_mxfp4(config: Any) -> bool:
    """Whether a base's experts are in MXFP4 where it comes from, by its config or that of its copy in 4 bits."""
    sections = (getattr(config, name, None) for name in ("quantization_config", PUBLISHED))
    return any(is_mxfp4(section, config.model_type) for section in sections)


def decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    """What MXFP4 stands for, each number exactly: a scale is made from its bits, and a product with it is no rounding.

    A scale of 255 stands for no number, and gives none.

    Args:
        blocks: [E, out, in / 32, 16] uint8, the first number in a byte's lower half.
        scales: [E, out, in / 32] uint8, exponents less 127.

    Returns:
        [E, in, out] bf16.
    """
    numbers = torch.tensor([*_NUMBERS, *(-number for number in _NUMBERS)], device=blocks.device)
    bits = scales.int() << _MANTISSA_BITS
    factors = torch.where(scales == 0, _HALF_OF_LEAST, bits).view(torch.float32)
    codes = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2)
    return (numbers[codes.int()] * factors[..., None]).to(torch.bfloat16).flatten(-2).transpose(1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Tensor:
    """All experts' weights of a layer in MXFP4; some of them are read and decoded when they are asked for."""

    blocks: StoredTensor
    scales: StoredTensor
    device: torch.device
    """Where they are decoded: they pass the host's memory as they are in the files."""

    @property
    def name(self) -> str:
        """What the model calls the weights."""
        return self.blocks.name.removesuffix(BLOCKS)

    @property
    def file(self) -> Path:
        """That the blocks are in."""
        return self.blocks.file

    @property
    def header(self) -> TensorHeader:
        """Of what is made of them."""
        experts, height, groups, half = self.blocks.header.shape
        return TensorHeader(dtype=self.get_dtype(), shape=(experts, groups * 2 * half, height))

    def __getitem__(self, experts: Any) -> Tensor:
        """Those of some experts, [e, in, out] bf16.

        Args:
            experts: a slice, or `...` for all, which are decoded one by one.
        """
        if experts is ...:
            whole = torch.empty(self.header.shape, dtype=torch.bfloat16, device=self.device)
            for expert in range(len(whole)):
                whole[expert : expert + 1] = self[expert : expert + 1]
            return whole
        values = decoded(self.blocks[experts].to(self.device), self.scales[experts].to(self.device))
        if not is_finite(values):
            self.scales.not_finite.add(self.scales.name)
        return values

    def get_dtype(self) -> str:
        """What is made of them."""
        return "BF16"


Stored = StoredTensor | Mxfp4Tensor
"""A tensor that is read when it is indexed."""


def with_decoded(tensors: Mapping[str, StoredTensor], device: torch.device) -> dict[str, Stored]:
    """What a base's files hold, each weight in MXFP4 under its own name; no data is read.

    Args:
        tensors: by name; blocks and scales go together, as `hold_to_promises` has found.
        device: that the model will be on.
    """
    found: dict[str, Stored] = dict(tensors)
    for name in in_mxfp4(tensors):
        blocks, scales = tensors[f"{name}{BLOCKS}"], tensors[f"{name}{SCALES}"]
        found[name] = Mxfp4Tensor(blocks=blocks, scales=scales, device=device)
        del found[f"{name}{BLOCKS}"], found[f"{name}{SCALES}"]
    return found
