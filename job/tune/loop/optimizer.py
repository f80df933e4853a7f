"""The recipe's optimizer and schedule, from the libraries."""

from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import get_scheduler

from job.core.recipe import TrainSection

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
"""By the recipe's names; what each keeps for a parameter stands in `core/memory.py`."""
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
