"""The LoRA adapter on a base: attached, counted, named for others, and refused where a target cannot take one."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from job.core.close_names import closest
from job.core.errors import UsageError
from job.core.recipe import LoraSection
from job.tune.model.config import empty_model
from job.tune.model.mixtures import experts_in, is_router
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


_OF_ONE_ADAPTER = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "inference_mode"),
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
    adapted = {wrapper.outside(name) for name, module in modules if isinstance(module, LoraLayer)}
    config.target_modules = {name.rpartition(".")[2] for name in adapted}
    beside = sorted(wrapper.left_out())
    config.exclude_modules = rf"({'|'.join(map(re.escape, beside))})(\..*)?" if beside else None
    if {name for name, _ in wrapper.whole.named_modules() if check_target_module_exists(config, name)} != adapted:
        config.target_modules = adapted


def _adapted(base: Any, lora: LoraSection, targets: str | list[str], *, revision: str | None) -> PeftModel:
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        revision=revision,
    )
    try:
        model: PeftModel = get_peft_model(base, config)
    except ValueError as error:
        raise UsageError(f"lora.targets: {error}; list the modules that shall get an adapter without it") from error
    if config.target_parameters:
        raise UsageError(
            f"lora.targets: in {type(base).__name__} PEFT takes {', '.join(sorted(_NAMES_OF_EXPERTS))} for the experts "
            "and their router, which get no adapter here; leave those names out of the list"
        )
    return model


_NAMES_OF_EXPERTS: frozenset[str] = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""What linear modules of experts were called before their weights became one tensor; PEFT still goes by these names."""


_WITH_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_NOT_IN_MAMBA = frozenset({"out_proj"})
"""Families in which PEFT refuses an adapter on modules of this name: fused kernels read their weights past it."""


def chosen_by_all_linear(base: Any) -> list[str] | None:
    """Names of what `all-linear` adapts, where that is not every linear module but the head; None: it is.

    In a mixture of experts: no routers, no experts; nor dense layers and shared experts whose modules are called like
    those of experts, as PEFT would put their adapters on the experts.
    """
    not_adapted = _NAMES_OF_EXPERTS if experts_in(base) else frozenset()
    if base.config.model_type in _WITH_MAMBA:
        not_adapted |= _NOT_IN_MAMBA
    if not not_adapted:
        return None
    head = base.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not is_router(base, name, module)
    }
    return sorted(names - not_adapted)


def _check_targets(base: Any, lora: LoraSection) -> str | list[str]:
    if isinstance(lora.targets, str):
        return chosen_by_all_linear(base) or lora.targets
    head = base.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not is_router(base, name, module)
    }
    unknown = [target for target in lora.targets if target not in linear]
    if unknown:
        meant = {target: found for target in unknown if (found := closest(target, linear)) is not None}
        hint = f"; did you mean {', '.join(f'{found} for {wrong}' for wrong, found in meant.items())}?" if meant else ""
        raise UsageError(
            f"lora.targets: {', '.join(unknown)}: no linear module of {type(base).__name__} has this name; "
            f"it has {', '.join(sorted(linear))}{hint}"
        )
    tied = base.config.tie_word_embeddings
    if tied and any(linear[target] is head for target in lora.targets):
        raise UsageError(
            "lora.targets: lm_head shares its weights with the input embeddings in this model (tied), so an adapter "
            "on it could not be merged or served; leave lm_head out of the list"
        )
    return list(lora.targets)
