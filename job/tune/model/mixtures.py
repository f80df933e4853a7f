"""What of a model are experts and their routers: they stay in 16 bits, and get no adapter."""

from typing import Any

from torch import nn

_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""What configs call the number of experts of a layer."""


def experts_in(model: Any) -> int:
    """Parameters of a model's experts, which transformers keeps in one tensor a layer, of three dimensions."""
    number = _experts_of_a_layer(model.config)
    if number <= 1:  # looked at for every module of a model, which may have thousands
        return 0
    return sum(
        parameter.numel()
        for parameter in model.parameters()
        if parameter.ndim == len(("expert", "out", "in")) and parameter.shape[0] == number
    )


def is_router(model: Any, name: str, module: Any) -> bool:
    """Whether a linear module chooses or weighs experts."""
    if not experts_in(model):
        return False
    is_named_so = {"router", "gate", "shared_expert_gate"} & {*name.split(".")}
    few = isinstance(module, nn.Linear) and module.out_features in {1, _experts_of_a_layer(model.config)}
    return "Router" in type(module).__name__ or (bool(is_named_so) and few)


def _experts_of_a_layer(config: Any) -> int:
    for name in _NUMBERS:
        number = getattr(config, name, None)
        if number:
            return int(max(number) if isinstance(number, list | tuple) else number)
    return 0
