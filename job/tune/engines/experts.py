"""The adapted model's experts in 4 bits, a layer's as a fused op in the place of PEFT's own forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from job.kernels.experts import Experts, ExpertsAdapter, ExpertsLinear, experts
from job.tune.model.experts import in_four_bits
from job.tune.model.mixtures import weights_of_experts


class FusedExperts:
    """Replaces the forward of a model's experts; their classes, parameters and what is saved stay as they are."""

    def __init__(self, model: PeftModel) -> None:
        wrapped = {each.base_layer: each for each in model.modules() if isinstance(each, ParamWrapper)}
        self._outer: dict[Any, Any] = {}
        """What is called -> the forward that it has without us; None: its class's own."""
        for module in model.modules():
            if in_four_bits(module):
                outer: Any = module
                while outer in wrapped:
                    outer = wrapped[outer]
                self._outer[outer] = vars(outer).get("forward")
        self._swapped = False

    def __bool__(self) -> bool:
        return bool(self._outer)

    def swap_in(self) -> None:
        """Ours from now on."""
        for outer in self._outer:
            outer.forward = MethodType(_forward, outer)
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


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
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

    def linear(name: str) -> ExpertsLinear:
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return ExpertsLinear(weights=in_four_bits(module)[name], bias=bias, adapter=adapters.get(name))

    return Experts(first=linear(first), gate=_gate(module), second=linear(second))


def _gate(module: Any) -> Any:
    return module._apply_gate if module.has_gate else module.act_fn  # noqa: SLF001 - as transformers' own products do


def _adapter(wrapper: nn.Module) -> ExpertsAdapter:
    layer: Any = wrapper
    (name,) = layer.lora_A
    return ExpertsAdapter(a=layer.lora_A[name].weight, b=layer.lora_B[name].weight, scaling=float(layer.scaling[name]))
