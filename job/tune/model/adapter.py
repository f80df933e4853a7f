"""The LoRA adapter on a base: attached, counted, and refused where a target cannot take one."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from job.core.close_names import closest
from job.core.errors import UsageError
from job.core.recipe import LoraSection


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
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        revision=revision,
    )
    model = get_peft_model(base, config)
    config.base_model_name_or_path = source
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
        Parameters of the adapter.

    Raises:
        UsageError: it is no causal language model; a target is no linear module of it, or is a tied head.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UsageError(f"model.base: {config.model_type} is no causal language model; choose another base") from error
    targets, head = _check_targets(model, lora), model.get_output_embeddings()
    adapted = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (module is not head if isinstance(targets, str) else name.rpartition(".")[2] in targets)
    ]
    return sum(lora.r * (module.in_features + module.out_features) for module in adapted)


def _check_targets(base: Any, lora: LoraSection) -> str | list[str]:
    if isinstance(lora.targets, str):
        return lora.targets
    head = base.get_output_embeddings()
    linear = {name.rpartition(".")[2]: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
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
