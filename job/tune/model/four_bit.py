"""The form of 4 bits: NF4 with double quantisation. Owner of bitsandbytes, its optimizers apart."""

import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.integrations import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION, HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from job.core.errors import DataError
from job.core.plan.memory import NF4_BLOCK, NF4_OUTER_BLOCK
from job.kernels.weights import Quantised
from job.tune.device.compute_dtype import compute_dtype
from job.tune.device.device import device_name
from job.tune.model.mixtures import experts_in, experts_in_four_bits, take_out_experts
from job.tune.model.recurrent import read_past_modules


def quantised_form(device: torch.device) -> dict[str, str]:
    """All that decides what a base becomes in 4 bits, to the bit: how it is packed, on what, and by which libraries.

    The scales of double quantisation are taken from a mean, which each kind of device sums in its own order.
    """
    versions = {name: importlib.metadata.version(name) for name in ("bitsandbytes", "torch", "transformers")}
    return {
        **{name: str(value) for name, value in quantisation(compute_dtype(device)).to_dict().items()},
        "block_size": str(NF4_BLOCK),
        "device": device_name(device),
        "vectors": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "",
        **{name: ".".join(version.split(".")[:2]) for name, version in versions.items()},
    }


def quantisation(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The same form as a config of transformers."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


@contextmanager
def without_experts() -> Iterator[None]:
    """Meanwhile transformers loads models in 4 bits without those experts that are put into them apart."""
    its_own = AUTO_QUANTIZER_MAPPING[_METHOD]
    AUTO_QUANTIZER_MAPPING[_METHOD] = _WithoutExperts
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[_METHOD] = its_own


_METHOD = "bitsandbytes_4bit"
"""Under what name transformers finds who quantises."""


class _WithoutExperts(Bnb4BitHfQuantizer):  # type: ignore[misc] # transformers has no types
    """Quantises what transformers' own does, but no weight that is read past its module."""

    @staticmethod
    def get_modules_to_not_convert(model: Any, *arguments: Any, **options: Any) -> list[str]:
        """Transformers' own list, and those."""
        own = HfQuantizer.get_modules_to_not_convert(model, *arguments, **options)
        return [*own, *read_past_modules(model)]

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **options: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **options)
        take_out_experts(model)


def form_of(model: Any) -> str:
    """What the model's layers truly are, counted: `NF4, double quantisation; 14 linear layers in 4 bits, 1 not (head)`.

    Args:
        model: with an adapter on it or without.
    """
    packed: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            packed[_kind(module.weight.quant_state)] += 1
        elif type(module) is nn.Linear and ".lora_" not in name:
            plain[name.removesuffix(".base_layer").rpartition(".")[2]] += 1
    kinds = [kind if len(packed) == 1 else f"{kind} ({count})" for kind, count in packed.most_common()]
    names = ", ".join(name if count == 1 else f"{count} {name}" for name, count in plain.most_common())
    left = f", {plain.total()} not ({names})" if plain else ""
    inside = experts_in_four_bits(model)
    outside = experts_in(model) - inside
    experts = f"; {inside:,} parameters of experts in 4 bits" if inside else ""
    experts += f"; {outside:,} parameters of experts not" if outside else ""
    return f"{' and '.join(kinds) or 'not quantised'}; {packed.total()} linear layers in 4 bits{left}{experts}"


def _kind(state: Any) -> str:
    blocks = "" if state.blocksize == NF4_BLOCK else f" in blocks of {state.blocksize}"
    return f"{state.quant_type.upper()}{blocks}, {'double' if state.nested else 'single'} quantisation"


def put_into_four_bits(model: Any, left: Collection[str] | None) -> dict[str, nn.Linear]:
    """Do to a model on the meta device what loading does to one with weights.

    Args:
        model: changed in place.
        left: modules that stay as they are; None: those that loading leaves.

    Returns:
        The modules that are in 4 bits, by name.
    """
    if left is None:
        keep = model._keep_in_fp32_modules  # noqa: SLF001 - as transformers does
        left = _WithoutExperts.get_modules_to_not_convert(model, None, keep)
    replace_with_bnb_linear(model, modules_to_not_convert=[*left], quantization_config=quantisation(torch.bfloat16))
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def is_another_in_four_bits(model: nn.Module) -> bool:
    """Whether transformers makes other modules of it when its files are in 4 bits already, as of Llama 4's experts."""
    return any(type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION for module in model.modules())


def packed_tensors(name: str, empty: Any, value: Tensor) -> dict[str, Tensor]:
    """A weight in 4 bits as files have it: packed, with its quantisation state beside it, all on the value's device.

    Args:
        name: the weight's.
        empty: what stands for it in a model on the meta device, from `put_into_four_bits`.
        value: [N, K] in the compute dtype.
    """
    packed = bnb.nn.Params4bit(value, requires_grad=False, **empty.__dict__).to(value.device)
    state: dict[str, Tensor] = packed.quant_state.as_dict(packed=True)
    return {name: packed.data, **{f"{name}.{part}": tensor for part, tensor in state.items()}}


def left_whole(model: Any) -> list[str]:
    """Names of the linear modules that are not in 4 bits, as the model has them without its adapter."""
    found = ((name.removesuffix(".base_layer"), module) for name, module in model.named_modules())
    return [name for name, module in found if type(module) in {nn.Linear, Conv1D} and ".lora_" not in name]


def without_cpu_repacking(model: nn.Module) -> None:
    """Keep the layers' weights as they are packed.

    On CPUs with AVX512-BF16 eval mode would repack them in place, and refuse some shapes.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Have a base that was published in 4 bits compute in `dtype`, not in the one that its config names."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = dtype
    exact = kept_in_fp32(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not exact(name):
            parameter.data = parameter.data.to(dtype)


def kept_in_fp32(kind: Any) -> Callable[[str], bool]:
    """Whether a tensor of this class keeps fp32 where bf16 computes, as some routers and decays do."""
    names = kind._keep_in_fp32_modules_strict or ()  # noqa: SLF001 - transformers' own list
    return lambda name: any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in names)


def quantised(matrix: Tensor) -> Quantised:
    """A matrix in 4 bits, to the bit as a linear layer's weight would be.

    Args:
        matrix: [N, K] in the compute dtype, on the device that will hold it.
    """
    packed, state = bnb.functional.quantize_4bit(
        matrix, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return quantised_of(packed, state)


def quantised_of(packed: Tensor, state: Any) -> Quantised:
    """What bitsandbytes holds, as the kernels take it."""
    return Quantised(
        packed=packed.detach().reshape(-1),
        scales=state.absmax,
        scales_code=state.state2.code.float(),
        outer_scales=state.state2.absmax.float(),
        offset=state.offset.reshape(1).float(),
        code=state.code.float(),
        height=int(state.shape[0]),
        width=int(state.shape[1]),
    )


def dequantised(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """A matrix's values [N, K], by bitsandbytes' own code."""
    scales = bnb.functional.QuantState(
        absmax=weight.outer_scales, code=weight.scales_code, blocksize=NF4_OUTER_BLOCK, dtype=torch.float32
    )
    state = bnb.functional.QuantState(
        absmax=weight.scales,
        shape=torch.Size((weight.height, weight.width)),
        code=weight.code,
        blocksize=NF4_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=weight.offset.reshape(()),
        state2=scales,
    )
    values: Tensor = bnb.functional.dequantize_4bit(weight.packed.reshape(-1, 1), quant_state=state)
    return values


def four_bit(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Put a weight into 4 bits as the base's layers are: rows [M, K] -> `rows @ weight.T` [M, N].

    Args:
        weight: [N, K] in the compute dtype, on the device that computes; K in whole blocks of 64.
    """
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )

    @torch.no_grad()
    def product(rows: Tensor) -> Tensor:
        result: Tensor = bnb.matmul_4bit(rows, packed, quant_state=state)
        return result

    return product


@torch.no_grad()
def through_four_bits(weight: Tensor) -> Tensor:
    """What the base's layers compute with once a weight is in 4 bits: quantised and dequantised, [N, K].

    Args:
        weight: in the compute dtype, on the device whose quantisation counts.
    """
    packed, state = bnb.functional.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    values: Tensor = bnb.functional.dequantize_4bit(packed, state)
    return values


@torch.no_grad()
def dequantised_in_files(packed: Tensor, beside: Mapping[str, Tensor], *, name: str) -> Tensor:
    """The values of a weight that files hold in 4 bits, in the dtype that they name for it.

    Args:
        packed: as it is stored.
        beside: its scales and its state, by their names.
        name: the weight's.

    Raises:
        DataError: they cannot be read.
    """
    try:
        state = bnb.functional.QuantState.from_dict({**beside}, device=packed.device)
        values: Tensor = bnb.functional.dequantize_4bit(packed, state)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{name}: its state in 4 bits cannot be read ({error}); copy the base again") from error
    return values


def shape_in_files(state: Tensor, *, name: str) -> tuple[int, ...]:
    """The shape of a weight that files hold in 4 bits.

    Args:
        state: the tensor that describes it, as JSON.
        name: the weight's.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return tuple(map(int, json.loads(bytes(state.tolist()))["shape"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: its state in 4 bits cannot be read ({error}); copy the base again") from error
