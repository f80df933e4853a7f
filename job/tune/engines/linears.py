"""The adapted model's linear layers and experts, fused ops in the place of PEFT's and bitsandbytes' own forward."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from job.kernels.experts import Experts, ExpertsAdapter, ExpertsLinear, experts
from job.kernels.linear_op import linear
from job.kernels.weights import Linear, Quantised
from job.kernels.which_ops import ops_of
from job.tune.engines.families import is_in_whole_blocks, linear_of
from job.tune.model.experts import in_four_bits
from job.tune.model.mixtures import gate_of, weights_of_experts

_MOST_SEEDS = 2**31


class FusedLinears:
    """Replaces the forward of a model's linear modules; their classes, parameters and what is saved stay as they are.

    PEFT's own forward casts each input to fp32 and back, copies each result, and keeps activations without need.
    """

    def __init__(self, model: PeftModel) -> None:
        self._modules = {
            module: (MethodType(its_forward, module), linear_of(module)) for module, its_forward in _fitting(model)
        }
        self._alone = _without_adapters(self._modules)
        for module in self._modules:
            module.mask_seed = None
        self.experts = FusedExperts(model)
        self._swapped = False
        self.keeps_dequantised = False
        """Whether weights are dequantised once and kept, not at each use."""
        self._swap_in()

    def __bool__(self) -> bool:
        return bool(self._modules) or (bool(self.experts) and self._swapped)

    def _swap_in(self) -> None:
        for module, (its_forward, layer) in self._modules.items():
            # The same objects each time: compiled code may guard on their identity.
            module.forward, module.fused, module.fused_alone = its_forward, layer, self._alone[module]
        self.experts.swap_in()
        self._swapped = True

    def _swap_out(self) -> None:
        if self._swapped:
            for module in self._modules:
                del module.forward, module.fused, module.fused_alone
            self.experts.swap_out()
        self._swapped = False

    def keep_dequantised(self, *, wanted: bool) -> None:
        """Dequantise each weight once and keep it, or at each use; those kept take what the base takes in 16 bits."""
        if wanted == self.keeps_dequantised:
            return
        layers = {module: linear_of(module) for module in self._modules}
        if wanted:
            layers = {module: _dequantised(module, layer) for module, layer in layers.items()}
        self._modules = {module: (its, layers[module]) for module, (its, _) in self._modules.items()}
        self._alone = _without_adapters(self._modules)
        self.keeps_dequantised = wanted
        if self._swapped:
            self._swap_in()

    @property
    def dequantised_bytes(self) -> int:
        """Of all weights in 4 bits, once they are dequantised and kept, in 16 bits."""
        layers = (layer for _, layer in self._modules.values())
        return sum(2 * layer.height * layer.width for layer in layers if isinstance(layer.weight, Quantised))

    def leave_to_peft(self) -> None:
        """Give the modules PEFT's own forward back, for good; the head's loss then goes through it too."""
        self._swap_out()
        self._modules.clear()
        self._alone.clear()

    def seed_masks(self, seed: int) -> None:
        """Seed the dropout masks of the next micro-batch: each layer has its own, by the seed alone."""
        dropping = [module for module, (_, layer) in self._modules.items() if module.training and _rate(layer)]
        if dropping:
            generator = torch.Generator().manual_seed(seed)
            seeds = torch.randint(_MOST_SEEDS, (len(dropping), 1), generator=generator)
            seeds = seeds.to(dropping[0].weight.device, non_blocking=True)
            for module, its_seed in zip(dropping, seeds, strict=True):
                module.mask_seed = its_seed

    @contextmanager
    def as_peft_has_them(self, *, experts_too: bool = True) -> Iterator[None]:
        """Meanwhile PEFT's own forward, which generates token by token without dequantising a weight for each.

        Args:
            experts_too: whether theirs too; it dequantises all of a layer's experts at each call.
        """
        was_swapped = self._swapped
        self._swap_out()
        if was_swapped and not experts_too:
            self.experts.swap_in()
        try:
            yield
        finally:
            if was_swapped:
                self.experts.swap_out()
                self._swap_in()


def _fitting(model: PeftModel) -> Iterator[tuple[Any, Any]]:
    """The layers that are plain LoRA on a linear layer, those in 4 bits without an adapter, and the head."""
    head = model.get_base_model().get_output_embeddings()
    adapted = {module.base_layer for module in model.modules() if isinstance(module, LoraLayer)}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            if _is_plain(module):
                yield module, _adapted_forward
        elif module not in adapted and (module is head or _is_in_four_bits(module)) and is_in_whole_blocks(module):
            yield module, _frozen_forward


def _is_plain(module: Any) -> bool:
    base = module.base_layer
    return (
        isinstance(base, nn.Linear)
        and len(module.lora_A) == 1
        and not module.lora_variant
        and not any(module.lora_bias.values())
        and not module.fan_in_fan_out
        and is_in_whole_blocks(base)
    )


def _is_in_four_bits(module: Any) -> bool:
    return isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state")


def _dequantised(module: Any, layer: Linear) -> Linear:
    if not isinstance(layer.weight, Quantised):
        return layer
    weight = getattr(module, "base_layer", module).weight
    values = torch.empty(layer.height, layer.width, dtype=weight.quant_state.dtype, device=weight.device)
    ops_of(values.device).dequantise(layer.weight, values)
    return replace(layer, weight=values)


def _rate(layer: Linear) -> float:
    return 0.0 if layer.adapter is None else layer.adapter.dropout


def _without_adapters(modules: Mapping[Any, tuple[Any, Linear]]) -> dict[Any, Linear]:
    return {module: replace(layer, adapter=None) for module, (_, layer) in modules.items()}


def _adapted_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.merged or args or kwargs:
        result: Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    if self.disable_adapters:
        return linear(x, self.fused_alone, None)
    return linear(x, self.fused, self.mask_seed if self.training else None)


def _frozen_forward(self: Any, x: Tensor) -> Tensor:
    return linear(x, self.fused, None)


class FusedExperts:
    """Replaces the forward of a model's experts; their classes, parameters and what is saved stay as they are."""

    def __init__(self, model: PeftModel) -> None:
        wrapped = {each.base_layer: each for each in model.modules() if isinstance(each, ParamWrapper)}
        self._outer: dict[Any, Any] = {}
        """What is called -> the forward that it has without us; None: its class's own."""
        for module in model.modules():
            if in_four_bits(module):
                outer: Any = module
                outer.gate_in_one = gate_of(outer)
                while outer in wrapped:
                    outer = wrapped[outer]
                self._outer[outer] = vars(outer).get("forward")
        self._swapped = False

    def __bool__(self) -> bool:
        return bool(self._outer)

    def swap_in(self) -> None:
        """Ours from now on."""
        for outer in self._outer:
            outer.forward = MethodType(_experts_forward, outer)
        self._swapped = True

    @contextmanager
    def ours(self) -> Iterator[None]:
        """Ours meanwhile, whoever's they were."""
        was_swapped = self._swapped
        self.swap_in()
        try:
            yield
        finally:
            if not was_swapped:
                self.swap_out()

    def swap_out(self) -> None:
        """Theirs from now on."""
        if self._swapped:
            for outer, own in self._outer.items():
                del outer.forward
                if own is not None:
                    outer.forward = own
        self._swapped = False


def _experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return experts(hidden_states, top_k_index, top_k_weights, experts_of(self))


def experts_of(outer: Any) -> Experts:
    """A layer's experts as the kernels take them, with the adapters that are on and not merged.

    Args:
        outer: the module, or what PEFT has wrapped around it.
    """
    module, adapters = outer, dict[str, ExpertsAdapter]()
    while isinstance(module, ParamWrapper):
        if not module.disable_adapters:
            adapters[module.parameter_name] = _adapter(module)
        module = module.base_layer
    first, second = weights_of_experts(module)

    def product(name: str) -> ExpertsLinear:
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return ExpertsLinear(weights=in_four_bits(module)[name], bias=bias, adapter=adapters.get(name))

    return Experts(first=product(first), gate=module.gate_in_one, second=product(second))


def _adapter(wrapper: nn.Module) -> ExpertsAdapter:
    layer: Any = wrapper
    (name,) = layer.lora_A
    return ExpertsAdapter(a=layer.lora_A[name].weight, b=layer.lora_B[name].weight, scaling=float(layer.scaling[name]))
