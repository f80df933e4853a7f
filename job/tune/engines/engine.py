"""TODO job.tune.engines.engine."""

from typing import Any, Protocol

import torch
from torch import Tensor

from job.tune.data.micro_batch import MicroBatch

Plan = dict[str, Any]
"""How a batch is cut for this device, as a checkpoint keeps it."""


class Path(Protocol):
    """The training loop knows no more of it than this."""

    def accumulate(self, batch: MicroBatch, *, targets: int) -> Tensor:
        """Add the gradients of (sum of the losses) / targets to the adapter's.

        Args:
            batch: a micro-batch, on the device.
            targets: of the whole step.

        Returns:
            Loss of each target, in nats: [N] fp32, detached.
        """
        ...

    def refresh(self) -> None:
        """The adapter changed: after each update, and after a checkpoint was loaded."""
        ...

    def adopt(self, plan: Plan) -> None:
        """Cut micro-batches, compute again, and compile, as this plan does; one of an older image does not say all."""
        ...

    def give_up_weights(self) -> Plan | None:
        """Keep no decoded weights from now on, which costs little; what changes in the plan, None where none are."""
        ...

    def compute_again(self) -> Plan | None:
        """Keep no activations from now on, which costs most; what changes in the plan, None where none are."""
        ...


def settle(path: Path, plan: Plan) -> bool:
    """Let a path adopt a plan; when memory has gone since that was made, without decoded weights.

    Returns:
        Whether all of it fitted; if not, the plan has changed.

    Raises:
        torch.OutOfMemoryError: nor does it fit without them.
    """
    try:
        path.adopt(plan)
    except torch.OutOfMemoryError:
        if not plan["kept_layers"]:
            raise
    else:
        return True
    torch.cuda.empty_cache()
    plan["kept_layers"] = 0
    path.adopt(plan)
    return False
