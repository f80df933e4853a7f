"""How a base is quantised already, by its config: which 4 bits are trained on; others are refused by name."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from job.core.base.mxfp4 import is_mxfp4
from job.core.errors import UsageError
from job.core.recipe.schema import is_hub_id

_SECTIONS = ("quantization_config", "compression_config", "quantization")
"""Where a config says it: transformers' own name, that of older compressed-tensors, and MLX's."""
_METHODS = MappingProxyType(
    {
        "gptq": "GPTQ",
        "awq": "AWQ",
        "fp8": "FP8",
        "fbgemm_fp8": "FP8 (FBGEMM)",
        "compressed-tensors": "compressed-tensors",
        "mxfp4": "MXFP4",
        "mxfp8": "MXFP8",
        "nvfp4": "NVFP4",
        "modelopt": "NVIDIA ModelOpt",
        "gguf": "GGUF",
        "auto-round": "AutoRound",
        "aqlm": "AQLM",
        "bitnet": "BitNet",
        "eetq": "EETQ",
        "exl2": "EXL2",
        "exl3": "EXL3",
        "higgs": "HIGGS",
        "hqq": "HQQ",
        "quanto": "Quanto",
        "quark": "Quark",
        "spqr": "SpQR",
        "torchao": "torchao",
        "vptq": "VPTQ",
    }
)
"""How the methods are written; one that is not here is named as the config has it."""
_SUFFIX = re.compile(
    r"(?:[-_.](?:GPTQ|AWQ|GGUF|FP8|NVFP4|MXFP[48]|EXL[23]|HQQ|AQLM|MLX|bnb|unsloth|quantized|dynamic|block|sym|i1"
    r"|int[48]|w\d+a\d+|[2-8](?:\.\d+)?[-_]?bits?|[2-8](?:\.\d+)?bpw|g\d+|128g|q[2-8](?:_\w+)?))+$",
    re.IGNORECASE,
)
"""What a repository's name ends with when its weights were quantised."""
_MOST_NAMES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBits:
    """A form of bitsandbytes' 4 bits, as a config writes it."""

    kind: str
    """`NF4` or `FP4`."""
    double: bool
    """Whether the scales are quantised as well."""
    compute: str
    """What its publisher computed in: `float16`."""
    skipped: tuple[str, ...]
    """Modules that the config leaves in 16 bits."""

    def __str__(self) -> str:
        left = f", {len(self.skipped)} modules not in 4 bits" if self.skipped else ""
        how = "double" if self.double else "single"
        return f"{self.kind}, {how} quantisation, published for {self.compute}{left}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4:
    """gpt-oss's own form: experts in MXFP4, which are decoded and put into NF4, and all else in 16 bits."""

    def __str__(self) -> str:
        return "MXFP4 in its experts"


def four_bits_of(config: Mapping[str, Any], *, source: str, named: Sequence[str]) -> FourBits | Mxfp4 | None:
    """The 4 bits in which a base is published; None: it is not quantised.

    Args:
        config: config.json's object.
        source: what the recipe calls the base.
        named: bases that its card and config name, as strangers wrote them.

    Raises:
        UsageError: it is quantised in another way.
    """
    for section in _sections(config):
        if is_mxfp4(section, config.get("model_type")):
            return Mxfp4()
        if not _is_bitsandbytes(section):
            raise foreign(_method(section), source=source, named=named)
        if not section.get("load_in_4bit"):
            raise foreign("bitsandbytes in 8 bits", source=source, named=named)
        skipped = section.get("llm_int8_skip_modules")
        return FourBits(
            kind="NF4" if section.get("bnb_4bit_quant_type") == "nf4" else "FP4",
            double=bool(section.get("bnb_4bit_use_double_quant")),
            compute=f"{section.get('bnb_4bit_compute_dtype') or 'float32'!s:.20}",
            skipped=tuple(map(str, skipped)) if isinstance(skipped, list) else (),
        )
    return None


def foreign(method: str, *, source: str, named: Sequence[str]) -> UsageError:
    """What to raise for a base that is quantised by this method."""
    found = unquantised(source, named)
    instead = f"; {' or '.join(found)} may be the model that it was made from" if found else ""
    return UsageError(
        f"{source}: the weights are quantised already, by {method}, and an adapter trained on them would be trained on "
        "something that this job does not compute; take the unquantised model (this job puts it into 4 bits itself), "
        f"or one in 4 bits of bitsandbytes{instead}"
    )


def unquantised(source: str, named: Sequence[str]) -> list[str]:
    """Hub ids of the model that a quantised one was probably made from, the likeliest first."""
    stripped = _SUFFIX.sub("", source) if is_hub_id(source) else source
    candidates = [*named, stripped]
    ids = [name for name in candidates if name != source and is_hub_id(name) and not _SUFFIX.search(name)]
    return list(dict.fromkeys(ids))[:_MOST_NAMES]


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What says that it is quantised, in the config or in that of its text model."""
    for each in (config, config.get("text_config")):
        for name in _SECTIONS:
            section = each.get(name) if isinstance(each, Mapping) else None
            if isinstance(section, Mapping) and section:
                yield section


def _is_bitsandbytes(section: Mapping[str, Any]) -> bool:
    method = section.get("quant_method")
    if method is None:  # so wrote the first versions
        return "load_in_4bit" in section or "load_in_8bit" in section
    return str(method).startswith("bitsandbytes")


def _method(section: Mapping[str, Any]) -> str:
    """The method's name, with what tells its kinds apart."""
    written = section.get("quant_method")
    if written is None:
        written = "MLX" if {"bits", "group_size"} <= section.keys() else "an unnamed method"
    name = _METHODS.get(str(written).lower(), f"{written!s:.40}")
    if name == "FP8":
        return "FP8, a scale a block" if section.get("weight_block_size") else "FP8, a scale a tensor"
    bits = section.get("bits")
    return f"{name} ({bits} bits)" if isinstance(bits, int) else name
