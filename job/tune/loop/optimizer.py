"""The recipe's optimizer and schedule, from the libraries."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import get_scheduler

from job.core.recipe.schema import TrainSection

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": lambda *args, **kwargs: torch.optim.AdamW(*args, fused=True, **kwargs),
    "adamw_8bit": bnb.optim.AdamW8bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    "lion_8bit": bnb.optim.Lion8bit,
    "paged_lion_8bit": bnb.optim.PagedLion8bit,
    "sgd": torch.optim.SGD,
}
"""By the recipe's names; what each keeps for a parameter stands in `core/plan/memory.py`."""
_SCHEDULE_ENDS = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "polynomial": {"lr_end": 0.0}}
"""Where a schedule ends, for those that ask: a tenth of the peak, and zero."""


def make_optimizer(parameters: Sequence[nn.Parameter], train: TrainSection) -> torch.optim.Optimizer:
    """The recipe's optimizer."""
    make = _OPTIMIZERS[train.optimizer]
    return make(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, *, steps: int) -> Any:
    """The recipe's learning rate over this many steps."""
    return get_scheduler(
        train.schedule,
        optimizer,
        num_warmup_steps=train.warmup_steps,
        num_training_steps=steps,
        scheduler_specific_kwargs=_SCHEDULE_ENDS.get(train.schedule),
    )


def set_schedule(scheduler: Any, optimizer: torch.optim.Optimizer, *, step: int) -> None:
    """Bring a fresh schedule to a step: its rates there are those that it would have come to step by step."""
    rates = [rate * factor(step) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    at_step = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    scheduler.load_state_dict(scheduler.state_dict() | at_step)


def state_after_a_step(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """What an optimizer keeps for each of its parameters: tensors on the meta device, which take no memory, and counts.

    bitsandbytes reads its tensors without looking at their sizes.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    twins = [nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters]
    if isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit):
        twin = object.__new__(type(optimizer))  # copy() would go by what torch pickles, and forget its arguments
        vars(twin).update(
            vars(optimizer),
            state=defaultdict(dict),
            is_paged=False,  # paged memory has the same shapes
            name2qmap=dict(optimizer.name2qmap),  # its first step moves these to where its parameter is
        )
        for index, parameter in enumerate(twins):
            twin.init_state(twin.param_groups[0], parameter, 0, index)
        return {index: dict(twin.state[parameter]) for index, parameter in enumerate(twins)}
    make: Callable[..., torch.optim.Optimizer] = type(optimizer)
    plain = make(twins, lr=0.0)
    for parameter in twins:
        parameter.grad = torch.empty_like(parameter)
    plain.step()
    return {
        index: {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in kept.items()}
        for index, kept in enumerate(plain.state[parameter] for parameter in twins)
    }
