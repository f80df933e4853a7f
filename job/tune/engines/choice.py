"""Which engine trains this model on this device, and why."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import Tensor

from job.core.errors import UsageError
from job.core.plan.memory import EngineName, WantedEngine
from job.kernels.decoder import Saving
from job.kernels.which_ops import has_triton, ops_of
from job.tune.data.trial_documents import Text
from job.tune.device.compute_dtype import dtype_of
from job.tune.device.failures import error_line
from job.tune.engines.attention import reason_against_fused_attention
from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.engine import Engine
from job.tune.engines.families import IN_WORDS, reason_against
from job.tune.engines.handwritten import HandwrittenEngine
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import difference

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An engine, and why it is this one."""

    engine: Engine
    name: EngineName
    reason: str
    compiled: bool
    """Whether it compiles the decoder's layers."""
    left_to_peft: bool = False
    """Whether linear layers are PEFT's own, as ours did not agree with them."""


def choose_engine(
    model: PackedModel, wanted: WantedEngine, *, backward: Callable[[Tensor], Any], text: Text = ()
) -> Choice:
    """The fast engine where it knows the model and agrees with the generic one on this device.

    Else the generic one, with our linear layers where those agree with PEFT's own.

    Args:
        model: base and adapter, on the device.
        wanted: `auto`, or one of the two.
        backward: autograd's, or accelerate's.
        text: what they are tried with.

    Raises:
        UsageError: `fast` is asked for, and does not know the model or differs.
    """
    device = next(model.parameters()).device
    attention = f"; attention by torch's kernels: {model.attention.reason}" if model.attention.reason else ""

    def generic(why: str) -> Choice:
        return _generic(model, f"{why}{attention}", backward=backward, text=text)

    if wanted == "generic":
        return generic("asked for")
    if wanted == "auto" and device.type == "cpu":
        return generic("on the CPU")
    against = reason_against(model.model) or _reason_of_device(device)
    if against is None:
        try:
            engine = HandwrittenEngine(
                model, ops_of(device), dtype=dtype_of(model.model), saving=Saving(kept_layers=0, recomputed_layers=0)
            )
            against = difference(model, engine, AutogradEngine(model, backward), text)
        except Exception as error:  # noqa: BLE001 - a compiler or a driver may refuse in any way
            against = error_line(error)
        else:
            if against is None:
                reason = f"a decoder of the Llama family; agrees with the generic engine{attention}"
                return Choice(engine=engine, name="fast", reason=reason, compiled=False)
    if wanted == "auto":
        return generic(f"not the fast engine: {against}")
    raise UsageError(f"--engine fast: {against}; leave the option out, and the generic engine trains this model")


def _generic(model: PackedModel, why: str, *, backward: Callable[[Tensor], Any], text: Text) -> Choice:
    """The generic engine, with our linear layers where they agree with PEFT's own, else with PEFT's own."""
    against = _reason_against_ops(model, AutogradEngine(model, backward), text)
    if against is not None:
        log.warning("linear_layers_left_to_peft", reason=against, then="slower, and more memory is needed")
        model.linears.leave_to_peft()
        if model.linears.experts:
            model.take_rows("alone")
        why = f"{why}; linear layers are PEFT's own: {against}"
    against_compiling = _reason_against_compiling(model)
    compiler = "inductor" if against_compiling is None else None
    if not model.is_packed:
        why = f"{why}; {IN_WORDS[model.rows]}"
    elif model.kernels_by_borders:
        why = f"{why}; documents apart by the kernels of {' and '.join(model.kernels_by_borders)}"
    how = "layers compiled" if against_compiling is None else f"layers not compiled: {against_compiling}"
    return Choice(
        engine=AutogradEngine(model, backward, compiler=compiler),
        name="generic",
        reason=f"{why}; {how}",
        compiled=compiler is not None,
        left_to_peft=against is not None,
    )


def _reason_against_ops(model: PackedModel, engine: AutogradEngine, text: Text) -> str | None:
    if not model.linears:
        return None
    try:
        return difference(model, engine, engine, text)
    except Exception as error:  # noqa: BLE001 - as above
        return error_line(error)


def _reason_of_device(device: torch.device) -> str | None:
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed"
    return None


def _reason_against_compiling(model: PackedModel) -> str | None:
    return next(_reasons_against_compiling(model), None)


def _reasons_against_compiling(model: PackedModel) -> Iterator[str]:
    device = next(model.parameters()).device
    if device.type != "cuda":
        yield "not on a GPU"
        return
    if not model.is_packed:
        yield "one document a row"
    if model.kernels_by_borders:
        yield f"they call kernels of {' and '.join(model.kernels_by_borders)}"
    if not model.layers:
        yield "they are of no kind that transformers recomputes"
    if not model.linears:
        yield "their linear layers are PEFT's own"
    if model.linears.experts:
        yield "how many tokens an expert gets is seen when it runs"
    reason = _reason_of_device(device) or reason_against_fused_attention(model.model.get_base_model().config)
    if reason is not None:
        yield reason
