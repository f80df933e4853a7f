"""The LoRA adapter on a base: attached, counted, named for others, and refused where a target cannot take one."""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from job.core.close_names import closest
from job.core.errors import UsageError
from job.core.recipe.schema import ALL_LINEAR, EXPERTS, LoraSection
from job.tune.model.config import empty_model
from job.tune.model.mixtures import experts_in, experts_modules, is_router, weights_of_experts
from job.tune.model.recurrent import read_past_modules
from job.tune.model.wrappers import Wrapper


def attach_lora(base: Any, lora: LoraSection, *, source: str, revision: str | None, seed: int) -> PeftModel:
    """A fresh adapter in fp32 on the base, its first values set by the seed.

    Args:
        base: from `load_base`.
        lora: the recipe's section.
        source: the base's name in the recipe; it is written into the adapter, a folder of this machine is not.
        revision: the base's commit, where it has one.
        seed: of the first values.

    Raises:
        UsageError: a target is no linear module of this model, or is a tied head.
    """
    targets = _check_targets(base, lora)
    torch.manual_seed(seed)
    model = _adapted(base, lora, targets, revision=revision)
    model.peft_config["default"].base_model_name_or_path = source
    for parameter in trainable(model):
        parameter.data = parameter.data.float()  # master weights; peft ignores autocast_adapter_dtype on a 4-bit base
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_counts(model: PeftModel) -> tuple[int, int]:
    """Trainable and total parameters; those in 4 bits count as what they stand for."""
    counts: tuple[int, int] = model.get_nb_trainable_parameters()
    return counts


def refuse_targets(config: Any, lora: LoraSection) -> int:
    """Check the recipe's targets against the base's config alone: no weight is read.

    Returns:
        Parameters of the adapter, counted on one without values.

    Raises:
        UsageError: it is no causal language model; a target is no linear module of it, or is a tied head; PEFT has no
            adapter for a target.
    """
    base = empty_model(config)
    return parameter_counts(_adapted(base, lora, _check_targets(base, lora), revision=None))[0]


def load_with_peft(base: Any, folder: Path, wrapper: Wrapper | None) -> PeftModel:
    """A published adapter on the base, as PEFT loads it for anybody.

    On a multimodal model PEFT gets the whole of it, so that names and targets are held to what others load; parts
    beside the decoder have no values there, and the decoder alone is what the result computes with.

    Args:
        base: from `load_base`, with nothing added to it yet.
        folder: with what PEFT reads.
        wrapper: the multimodal model that the base is the decoder of.
    """
    if wrapper is None:
        return PeftModel.from_pretrained(base, folder)
    whole = wrapper.around(base)
    model: Any = PeftModel.from_pretrained(whole, folder)
    for name, module in [*whole.named_modules()]:
        if isinstance(module, LoraLayer):
            inner = wrapper.inside(name)
            assert inner is not None, f"{name} got an adapter, and is no part of the text decoder"
            base.set_submodule(inner, module)
    model.base_model.model = base
    return model


def _is_of_modules(module: nn.Module) -> bool:
    """Whether it is an adapter on a module, not on a parameter of one."""
    return isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)


_OF_ONE_ADAPTER = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "inference_mode"),
        *("target_modules", "target_parameters", "exclude_modules"),
        *("base_model_name_or_path", "revision", "peft_version"),
    }
)
"""What differs from one adapter of ours to another."""


def odd_settings(config: Path) -> list[str]:
    """Keys of an adapter_config.json that no adapter of ours has so: it comes from a bucket, and PEFT obeys it.

    Raises:
        ValueError: it is no JSON object.
    """
    content = json.loads(config.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("no JSON object")  # noqa: TRY004 - as a file that is no JSON at all
    with tempfile.TemporaryDirectory() as folder:
        LoraConfig(task_type="CAUSAL_LM", bias="none").save_pretrained(folder)
        ours = json.loads((Path(folder) / "adapter_config.json").read_bytes())
    unlike = {name for name in {*content, *ours} - _OF_ONE_ADAPTER if content.get(name) != ours.get(name)}
    return sorted(unlike)


def name_for_whole(config: LoraConfig, model: PeftModel, wrapper: Wrapper) -> None:
    """Have a config's targets mean, on the whole multimodal model, what they are in the decoder, and nothing else.

    By the last part of their names, which is what servers go by too; where that says too much, by their whole names.
    """
    modules = model.get_base_model().named_modules()
    adapted = {wrapper.outside(name) for name, module in modules if _is_of_modules(module)}
    config.target_modules = {name.rpartition(".")[2] for name in adapted}
    beside = sorted(wrapper.left_out())
    config.exclude_modules = rf"({'|'.join(map(re.escape, beside))})(\..*)?" if beside else None
    if {name for name, _ in wrapper.whole.named_modules() if check_target_module_exists(config, name)} != adapted:
        config.target_modules = adapted


@dataclass(frozen=True, slots=True)
class _Targets:
    """What gets an adapter, as PEFT is asked for it."""

    modules: str | list[str]
    parameters: list[str]
    """Experts'."""


def _adapted(base: Any, lora: LoraSection, targets: _Targets, *, revision: str | None) -> PeftModel:
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        bias="none",
        task_type="CAUSAL_LM",
        revision=revision,
    )
    try:
        model: PeftModel = get_peft_model(base, config)
    except ValueError as error:
        raise UsageError(f"lora.targets: {error}; list the modules that shall get an adapter without it") from error
    if {*(config.target_parameters or ())} - {*targets.parameters}:
        raise UsageError(
            f"lora.targets: in {type(base).__name__} PEFT takes {', '.join(sorted(_NAMES_OF_EXPERTS))} for the experts "
            f"and their router; leave those names out of the list, or write `{EXPERTS}` for the experts"
        )
    return model


_NAMES_OF_EXPERTS: frozenset[str] = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""What linear modules of experts were called before their weights became one tensor; PEFT still goes by these names."""


_WITH_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_NOT_IN_MAMBA = frozenset({"out_proj"})
"""Families in which PEFT refuses an adapter on modules of this name: fused kernels read their weights past it."""


def chosen_by_all_linear(base: Any) -> list[str] | None:
    """Names of what `all-linear` adapts, where that is not every linear module but the head; None: it is.

    In a mixture of experts: no routers, no experts; nor dense layers and shared experts in families where PEFT would
    put the adapters of modules with their names on the experts.
    """
    is_mixture, not_adapted = bool(experts_in(base)), frozenset[str]()
    if is_mixture:
        not_adapted = _taken_for_experts(base)
    not_adapted |= _read_past_modules(base) | _of_its_own_adapters(base) | _of_indexers(base) | _of_routers(base)
    if base.config.model_type in _WITH_MAMBA:
        not_adapted |= _NOT_IN_MAMBA
    if not not_adapted and not is_mixture:
        return None
    head = base.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    return sorted(names - not_adapted)


def _of_routers(base: Any) -> frozenset[str]:
    """Names of routers, and of the linear modules in them."""
    return frozenset(name.rpartition(".")[2] for name, module in base.named_modules() if is_router(base, name, module))


def _of_indexers(base: Any) -> frozenset[str]:
    """Names of what chooses the tokens that sparse attention looks at (DeepSeek's): no gradient comes through it."""
    names = (name for name, module in base.named_modules() if isinstance(module, nn.Linear))
    return frozenset(name.rpartition(".")[2] for name in names if ".indexer." in name)


def _of_its_own_adapters(base: Any) -> frozenset[str]:
    """Names of the adapters that a base comes with (Zamba2's): each of its blocks holds all, and runs one of them."""
    names = (name for name, module in base.named_modules() if isinstance(module, nn.Linear))
    return frozenset(name.rpartition(".")[2] for name in names if "_adapter_list." in name)


def _read_past_modules(base: Any) -> frozenset[str]:
    return frozenset(name.rpartition(".")[2] for name in read_past_modules(base))


def _taken_for_experts(base: Any) -> frozenset[str]:
    """Names that PEFT, in this base's family, takes for its experts and their router.

    Those that stay in 16 bits may become modules of these names when they are read.
    """
    if next(experts_modules(base), None) is None:
        return _NAMES_OF_EXPERTS
    config = LoraConfig(target_modules=[*_NAMES_OF_EXPERTS])
    convert_peft_config_for_transformers(config, base, None)
    return _NAMES_OF_EXPERTS - {*(config.target_modules or ())}


def _check_targets(base: Any, lora: LoraSection) -> _Targets:
    names = (lora.targets,) if isinstance(lora.targets, str) else lora.targets
    parameters = _parameters_of_experts(base) if lora.on_experts else []
    modules: str | list[str] = [name for name in names if name not in {ALL_LINEAR, EXPERTS}]
    _check_modules(base, modules)
    if ALL_LINEAR in names:
        chosen = chosen_by_all_linear(base)
        modules = ALL_LINEAR if chosen is None else [*chosen, *(name for name in modules if name not in chosen)]
    return _Targets(modules, parameters)


def _parameters_of_experts(base: Any) -> list[str]:
    """The ends of their names, which no other parameter of the model has."""
    ends = {
        f"{path.rpartition('.')[2]}.{name}"
        for path, module in experts_modules(base)
        for name in weights_of_experts(module)
    }
    if not ends:
        raise UsageError(
            f"lora.targets: {type(base).__name__} has no experts that this job puts into 4 bits; leave {EXPERTS} out "
            "of the list"
        )
    return sorted(ends)


def _words_on_mixture(base: Any, unknown: Sequence[str]) -> str | None:
    """Why routers, and experts by the names of their weights, are no targets; None: these are neither."""
    named = _of_routers(base)
    routers = [name for name in unknown if name.rpartition(".")[2] in named]
    if routers:
        return (
            f"{', '.join(routers)} of {type(base).__name__} chooses or weighs experts, and routers stay as they are; "
            "leave the name out of the list"
        )
    weights = {name for _, module in experts_modules(base) for name in weights_of_experts(module)}
    experts = [name for name in unknown if weights and name.rpartition(".")[2] in weights | _NAMES_OF_EXPERTS]
    if not experts:
        return None
    return (
        f"in {type(base).__name__} {', '.join(experts)} can only be the experts', which are no linear modules; write "
        f"`{EXPERTS}` for them"
    )


def _check_modules(base: Any, targets: Sequence[str]) -> None:
    head = base.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    for name in _of_routers(base):  # PEFT goes by the name's end
        linear.pop(name, None)
    unknown = [target for target in targets if target not in linear]
    if unknown and (of_a_mixture := _words_on_mixture(base, unknown)):
        raise UsageError(f"lora.targets: {of_a_mixture}")
    if unknown:
        meant = {target: found for target in unknown if (found := closest(target, linear)) is not None}
        hint = f"; did you mean {', '.join(f'{found} for {wrong}' for wrong, found in meant.items())}?" if meant else ""
        raise UsageError(
            f"lora.targets: {', '.join(unknown)}: no linear module of {type(base).__name__} has this name; "
            f"it has {', '.join(sorted(linear))}{hint}"
        )
    past = sorted(_read_past_modules(base) & {*targets})
    if past:
        raise UsageError(
            f"lora.targets: {', '.join(past)}: {type(base).__name__} multiplies its weight past the module, so that an "
            "adapter on it would be passed over by whoever loads it; leave it out of the list"
        )
    tied = getattr(base.config, "tie_word_embeddings", False)
    if tied and any(linear[target] is head for target in targets):
        raise UsageError(
            "lora.targets: lm_head shares its weights with the input embeddings in this model (tied), so an adapter "
            "on it could not be merged or served; leave lm_head out of the list"
        )
