"""Whether a base's weights are what its config promises: which tensors are wrong, and what probably went wrong."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from job.core.errors import DataError

_SHOWN = 3
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.", "_forward_module.")
"""What torch.compile, DDP, FSDP, PEFT and DeepSpeed put before every name."""
_SCALES = re.compile(r"(?:scale|scales|scale_inv|zeros|zero_point|qzeros|qweight|g_idx|absmax|SCB|amax)$|_scale\b")
STATE = ".quant_state.bitsandbytes__"
"""What the name of a weight's quantisation state goes on with; its kind of 4 bits follows."""
_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """A tensor as the header of its file has it."""

    dtype: str
    """As the format writes it: `BF16`."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * int("".join(filter(str.isdigit, self.dtype.partition("_")[0])) or 8) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """Where a base's files and its model do not go together, by the tensors' names."""

    missing: Collection[str] = ()
    """The model has them, the files do not."""
    unexpected: Collection[str] = ()
    """The files have them, the model has no place for them."""
    other_shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """The shape in the files, and the model's."""
    other_dtypes: Mapping[str, str]
    """In the files, where they stand for numbers that no bf16, fp16 or fp32 is."""


def refuse(found: Differences, *, source: str) -> None:
    """Raise what is wrong, the likeliest cause first.

    Raises:
        DataError: anything is.
    """
    said = [*_words(found)]
    if said:
        cause = _cause(found)
        raise DataError(
            f"{source}: the weights are not what config.json promises: {'; '.join(said)}"
            f"{cause and f'; {cause}'}; copy the model again, or choose another model.base"
        )


def form_in_files(tensors: Mapping[str, TensorHeader], left: Collection[str] | None) -> str:
    """In which form a base's weights are published: `bf16`, or in which 4 bits and how many layers are.

    Args:
        tensors: all of the files.
        left: linear modules that are not in 4 bits; None: none is.
    """
    kinds = Counter(
        (name.rpartition("__")[2].upper(), f"{name.partition(STATE)[0]}.nested_absmax" in tensors)
        for name in tensors
        if STATE in name
    )
    if left is None or not kinds:
        sizes: Counter[str] = Counter()
        for tensor in tensors.values():
            sizes[tensor.dtype] += tensor.bytes
        return _DTYPES.get(dtype := sizes.most_common(1)[0][0], dtype)
    packed = [
        f"{kind}, {'double' if nested else 'single'} quantisation" + (f" ({count})" if len(kinds) > 1 else "")
        for (kind, nested), count in kinds.most_common()
    ]
    whole = Counter(name.rpartition(".")[2] for name in left)
    names = ", ".join(name if count == 1 else f"{count} {name}" for name, count in whole.most_common())
    said = f", {whole.total()} not ({names})" if whole else ""
    return f"{' and '.join(packed)}; {kinds.total()} linear layers in 4 bits{said}"


def unusual_dtypes(tensors: Mapping[str, TensorHeader], parameters: Collection[str]) -> dict[str, str]:
    """Those of these parameters whose numbers are of a kind that only a quantised model has."""
    return {
        name: tensors[name].dtype for name in parameters if name in tensors and tensors[name].dtype not in _FLOATING
    }


def _words(found: Differences) -> list[str]:
    said = []
    if found.missing:
        said.append(f"{_counted(found.missing, 'of the model')} not in the files ({_named(found.missing)})")
    if found.unexpected:
        said.append(f"{_counted(found.unexpected, 'of the files')} not of the model ({_named(found.unexpected)})")
    if found.other_shapes:
        name = min(found.other_shapes, key=_natural)
        stored, wanted = found.other_shapes[name]
        said.append(
            f"{_counted(found.other_shapes)} of another shape ({name:.120}: {_sizes(stored)} in the files, "
            f"{_sizes(wanted)} in the model)"
        )
    if found.other_dtypes:
        kinds = ", ".join(sorted({*found.other_dtypes.values()}))
        said.append(f"{_counted(found.other_dtypes)} stored as {kinds} ({_named(found.other_dtypes)})")
    return said


def _cause(found: Differences) -> str:
    for wrapper in _WRAPPERS:
        if found.unexpected and all(name.startswith(wrapper) for name in found.unexpected):
            return f"every name begins with {wrapper}, which a wrapper left there: save the model without it"
    if found.other_dtypes or any(_SCALES.search(name) for name in found.unexpected):
        return "scales are left over: the weights were quantised, and the config does not say how"
    return ""


def _counted(names: Collection[str], whose: str = "") -> str:
    one = len(names) == 1
    return " ".join(filter(None, (f"{len(names):,} tensor{'' if one else 's'}", whose, "is" if one else "are")))


def _named(names: Collection[str]) -> str:
    first = sorted(names, key=_natural)[:_SHOWN]
    return ", ".join([*(f"{name:.120}" for name in first), *["..."] * (len(names) > len(first))])


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape) or "one number"
