"""MXFP4 in a base's files: which tensors hold an expert's weights, and of what shape these are.

OCP Microscaling Formats 1.0, section 5: 32 numbers of 4 bits (E2M1) share a scale of 8 bits (E8M0), a power of two.
Published so are gpt-oss's experts, two numbers a byte: `NAME_blocks` [experts, out, in / 32, 16] and `NAME_scales`
[experts, out, in / 32]; what they stand for is NAME as the model has it, [experts, in, out].
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from job.core.base.promises import TensorHeader, form_in_files

BLOCKS, SCALES = "_blocks", "_scales"
"""What the names of the two tensors end with."""
_BLOCK = 32
"""Numbers that share a scale."""
_METHOD = "mxfp4"
_FAMILIES = ("gpt_oss",)
"""Whose experts are published so."""


def is_mxfp4(section: Any, model_type: object) -> bool:
    """Whether a config's section on quantisation says that this family's experts are in MXFP4."""
    method = section.get("quant_method") if isinstance(section, Mapping) else getattr(section, "quant_method", None)
    return str(method).lower().rpartition(".")[2] == _METHOD and model_type in _FAMILIES


def in_mxfp4(names: Collection[str]) -> list[str]:
    """Names of the weights of which there are blocks, scales, or both."""
    ends = (BLOCKS, SCALES)
    return sorted({name[: -len(end)] for name in names for end in ends if name.endswith(end)})


def form_with_experts(headers: Mapping[str, TensorHeader]) -> str | None:
    """In which form a base with experts in MXFP4 is published; None: none are, whatever its config says."""
    names = in_mxfp4(headers)
    if not names:
        return None
    others = {name: each for name, each in headers.items() if not name.endswith((BLOCKS, SCALES))}
    return f"MXFP4 ({len(names)} tensors of experts), all else {form_in_files(others, None)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """What a base's files hold, as if nothing in them were in MXFP4, and what is wrong with what is."""

    headers: Mapping[str, TensorHeader]
    missing: list[str]
    """Blocks without scales, or scales without blocks: what lacks."""
    other_shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Blocks and scales that do not go together: the shape in the files, and that which would."""
    other_dtypes: Mapping[str, str]
    """Those that are no bytes."""


def unpacked(headers: Mapping[str, TensorHeader]) -> Unpacked:
    """Each weight in MXFP4 under its own name, of the shape that the model has it in."""
    found, missing, shapes, dtypes = dict(headers), [], {}, {}
    for name in in_mxfp4(headers):
        blocks, scales = found.pop(f"{name}{BLOCKS}", None), found.pop(f"{name}{SCALES}", None)
        missing += [f"{name}{end}" for end, each in ((BLOCKS, blocks), (SCALES, scales)) if each is None]
        groups = blocks.shape[:-1] if blocks is not None else scales.shape if scales is not None else ()
        for end, each, wanted in ((BLOCKS, blocks, (*groups, _BLOCK // 2)), (SCALES, scales, groups)):
            if each is not None and each.shape != wanted:
                shapes[f"{name}{end}"] = each.shape, wanted
            if each is not None and each.dtype != "U8":
                dtypes[f"{name}{end}"] = each.dtype
        if len(groups) == len(("expert", "out", "group")):
            experts, height, count = groups
            a_group = _BLOCK if blocks is None else 2 * blocks.shape[-1]
            found[name] = TensorHeader(dtype="BF16", shape=(experts, count * a_group, height))
    return Unpacked(headers=found, missing=missing, other_shapes=shapes, other_dtypes=dtypes)
