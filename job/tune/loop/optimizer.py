"""TODO job.tune.loop.optimizer."""

from collections.abc import Callable, Sequence

import bitsandbytes as bnb
import torch
from torch import nn

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


def make_optimizer(parameters: Sequence[nn.Parameter], train: TrainSection) -> torch.optim.Optimizer:
    """The recipe's optimizer."""
    make = _OPTIMIZERS[train.optimizer]
    return make(parameters, lr=train.learning_rate, weight_decay=train.weight_decay)
