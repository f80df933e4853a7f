"""What of a model are experts and their routers, which are put into 4 bits, and what stands between their products."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from job.core.plan.memory import NF4_BLOCK
from job.kernels.ops import Gate

_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""What configs call the number of experts of a layer."""
_ROUTERS = frozenset({"router", "gate"})
"""What transformers calls a router, or what it is in."""
_FIRST = ("up_proj", "gate_up_proj")
"""What transformers calls the first weight of a layer's experts, without a gate and with one."""


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
    """Whether a linear module chooses or weighs experts, or is part of what does: some routers have several layers."""
    if not experts_in(model):
        return False
    *above, own = name.split(".")
    few = isinstance(module, nn.Linear) and module.out_features in {1, _experts_of_a_layer(model.config)}
    is_one = own in {*_ROUTERS, "shared_expert_gate"} and few
    return "Router" in type(module).__name__ or is_one or bool(_ROUTERS & {*above})


def has_other_experts(model: nn.Module) -> bool:
    """Whether a config names experts that are no tensors of three dimensions, and so are not known as experts here."""
    names = (name.lower() for name, _ in model.named_modules())
    is_mixture = _experts_of_a_layer(model.config) > 1 and not experts_in(model)
    return is_mixture and any("expert" in name or "router" in name for name in names)


def leave_noise(causal_lm: nn.Module) -> None:
    """Keep what may add noise to a router's choice in training out of training mode; not what is in it.

    A document's loss would depend on what stands beside it, and on how a batch is cut: the noise is drawn for all.
    PhiMoE's router draws some whatever its jitter is.
    """
    for module in causal_lm.modules():
        if _jitters_of(module):
            module.training = False


def has_noise(causal_lm: nn.Module) -> bool:
    """Whether a config asks for noise in a router's choice in training."""
    return any(any(_jitters_of(module)) for module in causal_lm.modules())


def _jitters_of(module: nn.Module) -> list[float | None]:
    """How large each noise is that a module may add."""
    return [value for name, value in vars(module).items() if "jitter" in name]


def _experts_of_a_layer(config: Any) -> int:
    for name in _NUMBERS:
        number = getattr(config, name, None)
        if number:
            return int(max(number) if isinstance(number, list | tuple) else number)
    return 0


def weights_of_experts(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that are put into 4 bits: both, or none.

    Of a module whose class lets transformers' grouped products compute it, whose rows are whole blocks, and whose
    result is a plain weighted sum.
    """
    if not hasattr(module, "is_concatenated") or getattr(module, "has_post_expert_norm", False):
        return ()
    first, second = _FIRST[bool(module.has_gate)], "down_proj"
    found = [module._parameters.get(name) for name in (first, second)]  # noqa: SLF001 - its own alone
    whole = all(each is not None and matrix_of_expert(module, each.shape)[1] % NF4_BLOCK == 0 for each in found)
    return (first, second) if whole else ()


def matrix_of_expert(module: Any, shape: torch.Size) -> tuple[int, int]:
    """[out, in] of an expert, from the shape of all experts' parameter."""
    _, *sides = shape
    return (sides[1], sides[0]) if module.is_transposed else (sides[0], sides[1])


def gate_of(module: Any) -> Gate | Callable[[Tensor], Tensor]:
    """What a module of experts has between its products: as one kernel, where it is found to be the same, or its own.

    Found out by trying: neither the activation nor where gate and up stand is written in a config.
    """
    if not module.has_gate:
        activation: Callable[[Tensor], Tensor] = module.act_fn.forward
        return activation
    its_own: Callable[[Tensor], Tensor] = module._apply_gate  # noqa: SLF001 - as transformers' own products do
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    known = [Gate()]
    if isinstance(alpha, float | int) and isinstance(limit, float | int):
        known.append(Gate(interleaved=True, alpha=float(alpha), limit=float(limit), one_more=True))
    probe = torch.linspace(-9.0, 9.0, 64, device="cpu").view(4, 16).roll(3, dims=1)
    with torch.no_grad():
        wanted = its_own(probe)
        return next((gate for gate in known if torch.allclose(gate(probe), wanted, rtol=1e-5, atol=1e-6)), its_own)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose experts are, or can be, in 4 bits."""
    yield from ((name, module) for name, module in model.named_modules() if weights_of_experts(module))


def experts_in_four_bits(model: nn.Module) -> int:
    """Parameters of experts that are put into 4 bits."""
    modules = (module for _, module in experts_modules(model))
    return sum(getattr(module, name).numel() for module in modules for name in weights_of_experts(module))


def take_out_experts(model: nn.Module) -> None:
    """Take the experts out of a model that is about to be loaded: nothing is missing, and no memory is taken."""
    modules: list[Any] = [module for _, module in experts_modules(model)]
    for module in modules:
        for name in weights_of_experts(module):
            del module._parameters[name]  # noqa: SLF001 - delattr would do the same
        module._is_hf_initialized = True  # noqa: SLF001 - or transformers fills it with random numbers
