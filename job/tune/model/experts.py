"""A mixture's experts in 4 bits: loaded one at a time, written, and dequantised for transformers' own code."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from job.core.base.promises import STATE
from job.core.errors import DataError
from job.core.plan.memory import NF4_BLOCK, NF4_OUTER_BLOCK
from job.kernels.weights import Quantised, QuantisedExperts
from job.tune.model.config import empty_model
from job.tune.model.four_bit import dequantised, quantised
from job.tune.model.mixtures import experts_modules, matrix_of_expert, weights_of_experts

_HELD = "in_four_bits"
"""Attribute of a module whose experts are in 4 bits: name -> `QuantisedExperts`."""


def in_four_bits(module: nn.Module) -> Mapping[str, QuantisedExperts]:
    """The weights of a module's experts; empty where they are not in 4 bits."""
    held: Mapping[str, QuantisedExperts] = getattr(module, _HELD, {})
    return held


def tensors_of_experts(model: nn.Module, *, large: bool) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
    """What experts in 4 bits are made of, and what puts another tensor in the place of each.

    Args:
        model: or a part of it.
        large: those that are as long as the weights; else offsets and code books.
    """
    parts = ("packed", "scales", "outer_scales") if large else ("offsets", "scales_code", "code")
    for module in model.modules():
        held = getattr(module, _HELD, {})
        for name, weights in [*held.items()]:
            yield from ((getattr(weights, part), partial(_put, held, name, part)) for part in parts)


def _put(held: dict[str, QuantisedExperts], name: str, part: str, tensor: Tensor) -> None:
    held[name] = replace(held[name], **{part: tensor})  # type: ignore[arg-type] # no part is one of the two numbers


def stand_ins(model: nn.Module) -> list[nn.Parameter]:
    """The parameters without memory that stand in the place of experts."""
    return [module.get_parameter(name) for module in model.modules() for name in in_four_bits(module)]


def stand_in(shape: torch.Size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As large as it seems, of one number in memory.

    Infinite, so that whoever computes with it, past us, sees that.
    """
    return torch.full((), torch.inf, dtype=dtype, device=device).expand(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where one parameter of experts comes from."""

    converter: WeightConverter | None
    """transformers' own; None: the files have it as it is."""
    tensors: dict[str, list[Any]] = field(default_factory=dict)
    """Pattern -> tensors, in the experts' order: of each expert one, or one of all of them."""


class ExpertsApart:
    """What a base's files hold, with the experts' tensors apart from all others."""

    def __init__(self, config: Any, tensors: Mapping[str, Any]) -> None:
        """No data is read.

        Args:
            config: the model's.
            tensors: name -> what gives a tensor when it is indexed.
        """
        self._config = config
        self._model = empty_model(config)
        self._wanted = {
            f"{path}.{name}": (path, name)
            for path, module in experts_modules(self._model)
            for name in weights_of_experts(module)
        }
        self._sources: dict[str, _Source] = {}
        self.names: dict[str, str] = {}
        """What transformers calls those of `others` whose names it changes, and nothing else."""
        self._packed = {name: tensors for name in self._wanted if f"{name}{STATE}nf4" in tensors}
        of_packed = tuple(f"{name}." for name in self._packed)
        self.others = {
            name: tensor
            for name, tensor in tensors.items()
            if name not in self._packed and not name.startswith(of_packed or "\0")
        }
        """All that is not experts'."""
        if not self.are_in_four_bits:
            self._take_sources()

    def _take_sources(self) -> None:
        """Sort by the rules by which transformers itself renames and joins what files hold."""
        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        expected, prefix = self._model.state_dict(), self._model.base_model_prefix
        for name in sorted(self.others, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:
                target, pattern = rename_source_key(name, [], [], prefix, expected)
            if target in self._wanted and target not in self._packed:
                converter = None if pattern is None else of_pattern[pattern]
                source = self._sources.setdefault(target, _Source(converter=converter))
                source.tensors.setdefault(pattern or name, []).append(self.others.pop(name))
            elif pattern is None and target != name:
                self.names[name] = target

    def fill(self, model: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        """Put the experts into a model that was loaded without them, each quantised as soon as it is read.

        Raises:
            DataError: tensors that make one expert do not go together.
        """
        for target, (path, name) in self._wanted.items():
            module, shape = model.get_submodule(path), self._model.get_parameter(target).shape
            height, width = matrix_of_expert(module, shape)
            if target in self._packed:
                weights = _read(self._packed[target], target, shape[0], height, width, device)
            else:
                weights = self._quantised(target, module, shape, device, dtype)
            _hold(module, name, weights, shape=shape, dtype=dtype)

    @property
    def are_in_four_bits(self) -> bool:
        """Whether the files have all of them so."""
        return len(self._packed) == len(self._wanted)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of the experts' parameters, by name."""
        return {target: self._model.get_parameter(target).shape for target in self._wanted}

    def stored(self, target: str, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """One parameter of experts, quantised now, as the tensors of a copy in 4 bits."""
        path, _ = self._wanted[target]
        module: Any = self._model.get_submodule(path)
        return as_tensors(self._quantised(target, module, self.shapes[target], device, dtype), target)

    def _quantised(
        self, target: str, module: Any, shape: torch.Size, device: torch.device, dtype: torch.dtype
    ) -> QuantisedExperts:
        values = (self._one(target, expert, shape).to(device=device, dtype=dtype) for expert in range(shape[0]))
        return quantised_one_by_one((value.t() if module.is_transposed else value for value in values), shape[0])

    def _one(self, target: str, expert: int, shape: torch.Size) -> Tensor:
        """An expert's matrix as transformers has it, by its own conversion of that expert's tensors alone."""
        source = self._sources[target]
        taken: dict[str, Any] = {
            pattern: [tensors[expert][...]] if len(tensors) == shape[0] else [tensors[0][expert : expert + 1]]
            for pattern, tensors in source.tensors.items()
        }
        if source.converter is not None:
            for operation in source.converter.operations:
                taken = operation.convert(
                    taken,
                    source_patterns=source.converter.source_patterns,
                    target_patterns=source.converter.target_patterns,
                    full_layer_name=target,
                    model=self._model,
                    config=self._config,
                    missing_keys=None,
                )
        (value,) = taken.values()
        matrices: Tensor = value[0] if isinstance(value, list) else value
        if matrices.shape != (1, *shape[1:]):
            raise DataError(f"{target}: expert {expert} is {[*matrices.shape[1:]]} in the files, not {[*shape[1:]]}")
        return matrices[0]


def quantised_one_by_one(matrices: Iterable[Tensor], count: int) -> QuantisedExperts:
    """Experts in 4 bits, each quantised before the next is asked for.

    Args:
        matrices: each expert's, [out, in] in the compute dtype, on the device that will hold them.
        count: how many there are, at least one.
    """
    parts: list[Quantised] = []
    stacks: dict[str, Tensor] = {}
    for expert, matrix in enumerate(matrices):
        part = quantised(matrix.contiguous())
        for kind, tensor in _tensors(part).items():
            if not expert:
                stacks[kind] = torch.empty(count, *tensor.shape, dtype=tensor.dtype, device=tensor.device)
            stacks[kind][expert] = tensor
        parts = parts or [part]
    first = parts[0]
    return QuantisedExperts(
        packed=stacks["packed"],
        scales=stacks["scales"],
        outer_scales=stacks["outer_scales"],
        offsets=stacks["offset"].reshape(-1),
        scales_code=first.scales_code,
        code=first.code,
        height=first.height,
        width=first.width,
    )


def _tensors(part: Quantised) -> dict[str, Tensor]:
    return {"packed": part.packed, "scales": part.scales, "outer_scales": part.outer_scales, "offset": part.offset}


def _hold(module: Any, name: str, weights: QuantisedExperts, *, shape: torch.Size, dtype: torch.dtype) -> None:
    """Give a module its experts in 4 bits.

    In their place stands a parameter with their shape and no memory: PEFT and counts go by it.
    """
    seeming = stand_in(shape, dtype=dtype, device=weights.packed.device)
    module.register_parameter(name, nn.Parameter(seeming, requires_grad=False))
    if not hasattr(module, _HELD):
        setattr(module, _HELD, {})
        module.register_state_dict_post_hook(_write)
        module.forward = _Dequantising(module)
    getattr(module, _HELD)[name] = weights


class _Dequantising:
    """The forward of transformers' own code, or PEFT's, on weights that are dequantised for as long as it runs."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        places = [(name, *_place(module, name)) for name in in_four_bits(module)]
        before = [parameters[key] for _, parameters, key in places]
        try:
            for name, parameters, key in places:
                # Another parameter, not other data in this one: autograd would find the stand-in in the backward.
                values = dequantised_experts(module, name, dtype=parameters[key].dtype)
                parameters[key] = nn.Parameter(values, requires_grad=False)
            return type(module).forward(module, *args, **kwargs)
        finally:
            for (_, parameters, key), parameter in zip(places, before, strict=True):
                parameters[key] = parameter


def _place(module: Any, name: str) -> tuple[dict[str, Any], str]:
    """Where the parameter stands: PEFT puts it behind a parametrization while its own forward runs."""
    hidden = getattr(module, "parametrizations", {})
    if name in hidden:
        return hidden[name]._parameters, "original"  # noqa: SLF001 - as below
    return module._parameters, name  # noqa: SLF001 - setattr would go through the parametrization


def dequantised_experts(module: Any, name: str, *, dtype: torch.dtype) -> Tensor:
    """All experts' weights, [E, out, in] or as the module has them, by bitsandbytes' own code."""
    weights = in_four_bits(module)[name]
    values = torch.empty(len(weights), weights.height, weights.width, dtype=dtype, device=weights.packed.device)
    for expert in range(len(weights)):
        values[expert] = dequantised(weights[expert], dtype)
    return values.transpose(1, 2).contiguous() if module.is_transposed else values


def _write(module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name, weights in in_four_bits(module).items():
        state.update(as_tensors(weights, f"{prefix}{name}"))


def as_tensors(weights: QuantisedExperts, name: str) -> dict[str, Tensor]:
    """Names and forms of bitsandbytes' own files, with a dimension more; each expert's offset stands in the state."""
    about = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "nested_blocksize": NF4_OUTER_BLOCK,
        "shape": [len(weights), weights.height, weights.width],
        "nested_offset": weights.offsets.tolist(),
    }
    return {
        name: weights.packed.reshape(-1, 1),
        f"{name}.absmax": weights.scales,
        f"{name}.nested_absmax": weights.outer_scales,
        f"{name}.quant_map": weights.code,
        f"{name}.nested_quant_map": weights.scales_code,
        f"{name}{STATE}nf4": torch.tensor([*json.dumps(about).encode()], dtype=torch.uint8),
    }


def _read(
    tensors: Mapping[str, Any], name: str, count: int, height: int, width: int, device: torch.device
) -> QuantisedExperts:
    """What `as_tensors` has made.

    Raises:
        DataError: it is no copy of these experts.
    """
    try:
        about = json.loads(bytes(tensors[f"{name}{STATE}nf4"][...].tolist()))
        offsets, shape = about["nested_offset"], about["shape"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: its state in 4 bits cannot be read ({error}); copy the model again") from error
    if shape != [count, height, width] or len(offsets) != count:
        raise DataError(f"{name}: its state in 4 bits is of {shape}, not [{count}, {height}, {width}]; copy it again")
    whole = {kind: tensors[f"{name}{kind}"][...].to(device) for kind in ("", *_STATES)}
    return QuantisedExperts(
        packed=whole[""].view(count, -1),
        scales=whole[".absmax"],
        outer_scales=whole[".nested_absmax"],
        offsets=torch.tensor(offsets, dtype=torch.float32, device=device),
        scales_code=whole[".nested_quant_map"],
        code=whole[".quant_map"],
        height=height,
        width=width,
    )


_STATES = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
