"""What a model's class takes from tensors with names: all of it, or what is missing, left over, or of another shape."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from job.core.base.mxfp4 import Unpacked, is_mxfp4, unpacked
from job.core.base.promises import STATE, Differences, TensorHeader, refuse, unusual_dtypes
from job.core.errors import DataError
from job.tune.model.config import causal_lm_of, read_config, read_whole_config
from job.tune.model.four_bit import is_another_in_four_bits
from job.tune.model.mixtures import experts_modules
from job.tune.model.wrappers import parts_of

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of a weight of an expert that is a module of its own."""
_META = torch.device("meta")
_STATES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
"""What stands beside a weight in 4 bits."""
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}


def filled(kind: Any, config: Any, tensors: Mapping[str, Any], **options: Any) -> tuple[Any, Differences]:
    """A model with these tensors in it, by transformers' own rules for their names, and where they did not go together.

    Args:
        kind: the model's class.
        config: the model's.
        tensors: name -> what gives the tensor when it is indexed, and its dtype's name by `get_dtype`.
        options: of `from_pretrained`.

    Raises:
        DataError: tensors that make one tensor of the model do not go together.
    """
    try:
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise DataError(
            f"{kind.__name__}: its weights cannot be put together from those in the files; copy the model again"
        ) from error
    shapes = {name: (tuple(stored), tuple(wanted)) for name, stored, wanted in found["mismatched_keys"]}
    return model, Differences(
        missing=found["missing_keys"], unexpected=found["unexpected_keys"], other_shapes=shapes, other_dtypes={}
    )


def hold_to_promises(folder: Path, headers: Mapping[str, TensorHeader], *, source: str) -> list[str] | None:
    """Compare the tensors that a base's files have with those of the model that its config describes.

    Args:
        folder: with the configuration; no weights need be there.
        headers: every tensor of the files.
        source: what the recipe calls the base.

    Returns:
        Of a base in 4 bits, the linear modules that are not: publishers choose them layer by layer, and a config need
        not name all of them. What the files have counts, also where none is in 4 bits and the config says so: None.

    Raises:
        DataError: a tensor is missing, left over, of another shape, or of a dtype that no weight has; or transformers
            would make another model of these files than of those in 16 bits.
    """
    config, parts = read_config(folder), parts_of(read_whole_config(folder), headers)
    headers = parts.text
    packed: set[str] = set()
    incomplete: list[str] = []
    form = getattr(config, "quantization_config", None)
    mx = Unpacked(headers=headers, missing=[], other_shapes={}, other_dtypes={})
    if form is not None:
        del config.quantization_config
    if is_mxfp4(form, config.model_type):
        mx = unpacked(headers)
        headers, incomplete = mx.headers, mx.missing
    elif form is not None:
        packed = {name.partition(STATE)[0] for name in headers if STATE in name}
        incomplete = [*_incomplete(packed, headers)]
    states = {name + state for name in packed for state in _STATES}
    taken: set[str] = set()
    plain = {
        name: _Promised(name=name, shape=header.shape, taken=taken)
        for name, header in headers.items()
        if name not in states and STATE not in name
    }
    with _quietly():
        model, found = filled(causal_lm_of(config), config, plain, device_map={"": _META}, dtype=torch.bfloat16)
    if packed and is_another_in_four_bits(model):
        raise DataError(
            f"{source}: {type(model).__name__} is in 4 bits, and of such files transformers makes other experts than "
            "of those in 16 bits, with other tensors; choose this model in 16 bits as model.base"
        )
    if any(_ONE_EXPERT.search(name) for name in packed) and next(experts_modules(model), None) is not None:
        raise DataError(
            f"{source}: the experts of {type(model).__name__} are in 4 bits of bitsandbytes, which are not trained; "
            "choose this model in 16 bits as model.base, and its experts are put into 4 bits by this job"
        )
    sizes = {_ITEM_BYTES.get(header.dtype, 0) for name, header in headers.items() if name in packed}
    in_four_bits = {name for name, shapes in found.other_shapes.items() if _is_packed(*shapes, sizes)}
    whole_numbers = [name for name, buffer in model.named_buffers() if not buffer.is_floating_point()]
    weights = {name for name in taken - packed if not any(each.endswith(name) for each in whole_numbers)}
    other_shapes = {name: each for name, each in found.other_shapes.items() if name not in in_four_bits}
    refuse(
        Differences(
            missing=[*map(parts.name, [*found.missing, *incomplete])],
            unexpected=[*map(parts.name, found.unexpected), *parts.unknown],
            other_shapes={parts.name(name): each for name, each in {**other_shapes, **mx.other_shapes}.items()},
            other_dtypes={
                parts.name(name): each for name, each in {**unusual_dtypes(headers, weights), **mx.other_dtypes}.items()
            },
        ),
        source=source,
    )
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return [name for name in linear if f"{name}.weight" not in in_four_bits] if packed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Promised:
    """A tensor of which only the header is known."""

    name: str
    shape: tuple[int, ...]
    taken: set[str] = field(repr=False)
    """Gets the name when the model takes it."""

    def __getitem__(self, index: Any) -> Tensor:
        self.taken.add(self.name)
        return torch.empty(self.shape, dtype=torch.bfloat16, device=_META)[index]

    def get_dtype(self) -> str:
        return "BF16"


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' own report: it calls weights in 4 bits mismatched, and what is wrong is raised by us."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _incomplete(packed: Iterable[str], headers: Mapping[str, TensorHeader]) -> Iterable[str]:
    """What a weight in 4 bits lacks: its scales, and where those are quantised, theirs."""
    for name in packed:
        nested = any(f"{name}{state}" in headers for state in _STATES[2:])
        yield from (f"{name}{state}" for state in _STATES[: 4 if nested else 2] if f"{name}{state}" not in headers)


def _is_packed(stored: tuple[int, ...], wanted: tuple[int, ...], item_bytes: Iterable[int]) -> bool:
    """Whether a shape in the files is that of the model in 4 bits: two values a byte, in one column or row."""
    values = torch.Size(wanted).numel()
    one_line = len(stored) == 2 and 1 in stored  # noqa: PLR2004 a column or a row
    return one_line and any(max(stored) * size == (values + 1) // 2 for size in item_bytes)
