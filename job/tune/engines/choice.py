"""Which path trains this model on this device, and why."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import structlog
import torch
from torch import Tensor

from job.core.errors import UsageError
from job.kernels.llama_step import Thrift
from job.kernels.which_ops import has_triton, ops_of
from job.tune.device.failures import told
from job.tune.engines.attention import reason_against_one_op
from job.tune.engines.autograd import AutogradPath, Compiling
from job.tune.engines.engine import Path
from job.tune.engines.families import reason_against
from job.tune.engines.handwritten import FastPath
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import difference
from job.tune.model.four_bit import COMPUTE_DTYPE

log = structlog.get_logger(__name__)

Wanted = Literal["auto", "fast", "generic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A path, and why it is this one."""

    path: Path
    name: Literal["fast", "generic"]
    reason: str
    compiled: bool
    """Whether it compiles the decoder's layers."""


def choose_path(
    model: PackedModel,
    wanted: Wanted,
    *,
    backward: Callable[[Tensor], Any],
    on_stopped: Callable[[str], None],
    dtype: torch.dtype = COMPUTE_DTYPE,
) -> Choice:
    """The fast path where it is asked for, the model fits it, and it gives on this device what the generic one gives.

    Else the generic one, with the engine's linear layers where those give what PEFT's own give.

    Args:
        model: base and adapter, on the device.
        wanted: `auto`, or one of the two.
        backward: autograd's, or accelerate's.
        on_stopped: told why layers that were compiled no longer are.
        dtype: what is computed in.

    Raises:
        UsageError: `fast` is asked for, and does not fit.
    """
    device = next(model.parameters()).device
    attention = f"; attention by torch's kernels: {model.attention.reason}" if model.attention.reason else ""

    def generic(why: str) -> Choice:
        return _generic(model, f"{why}{attention}", backward=backward, on_stopped=on_stopped)

    if wanted == "generic":
        return generic("asked for")
    if wanted == "auto" and device.type == "cpu":
        return generic("on the CPU")
    against = reason_against(model.model) or _reason_of_device(device)
    if against is None:
        try:
            path = FastPath(model, ops_of(device), dtype=dtype, thrift=Thrift(kept_layers=0, recomputed_layers=0))
            against = difference(model, path, AutogradPath(model, backward))
        except Exception as error:  # noqa: BLE001 - a compiler or a driver may refuse in any way
            against = told(error)
        else:
            if against is None:
                reason = f"a decoder of the Llama family; agrees with the generic path{attention}"
                return Choice(path=path, name="fast", reason=reason, compiled=False)
    if wanted == "auto":
        return generic(f"not the fast path: {against}")
    raise UsageError(f"--engine fast: {against}; leave the option out, and the generic path trains this model")


def _generic(
    model: PackedModel, why: str, *, backward: Callable[[Tensor], Any], on_stopped: Callable[[str], None]
) -> Choice:
    """The generic path with the engine's linear layers where they give what PEFT's own give, else with PEFT's own."""
    against = _reason_against_ops(model, AutogradPath(model, backward))
    if against is not None:
        log.warning("linear_layers_left_to_peft", reason=against, then="slower, and more memory is needed")
        model.linears.leave_to_peft()
        why = f"{why}; linear layers are PEFT's own: {against}"
    as_they_are = _reason_against_compiling(model)
    compiling = Compiling(backend="inductor", on_stopped=on_stopped) if as_they_are is None else None
    how = "layers compiled" if as_they_are is None else f"layers not compiled: {as_they_are}"
    return Choice(
        path=AutogradPath(model, backward, compiling=compiling),
        name="generic",
        reason=f"{why}; {how}",
        compiled=compiling is not None,
    )


def _reason_against_ops(model: PackedModel, path: AutogradPath) -> str | None:
    if not model.linears:
        return None
    try:
        return difference(model, path, path)
    except Exception as error:  # noqa: BLE001 - as above
        return told(error)


def _reason_of_device(device: torch.device) -> str | None:
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed"
    return None


def _reason_against_compiling(model: PackedModel) -> str | None:
    device = next(model.parameters()).device
    if device.type != "cuda":
        return "not on a GPU"
    if not model.layers:
        return "they are of no kind that transformers computes again"
    if not model.linears:
        return "their linear layers are PEFT's own"
    return _reason_of_device(device) or reason_against_one_op(model.model.get_base_model().config)
