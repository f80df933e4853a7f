"""Whether a base's weights are what its config promises: which tensors are wrong, and what probably went wrong."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from job.core.errors import DataError

_SHOWN = 3
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.", "_forward_module.")
"""What torch.compile, DDP, FSDP, PEFT and DeepSpeed put before every name."""
_SCALES = re.compile(r"(?:scale|scales|scale_inv|zeros|zero_point|qzeros|qweight|g_idx|absmax|SCB|amax)$|_scale\b")
_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHeader:
    """A tensor as the header of its file has it."""

    dtype: str
    """As the format writes it: `BF16`."""
    shape: tuple[int, ...]


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
