"""The proof: the adapter as anybody would get it, from the store, gives the loss that was measured in training."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from job.core.errors import SickDeviceError
from job.core.packing import Rows
from job.edge.store.folder import FileEntry
from job.stages.attempt import Attempt
from job.stages.loading import Inputs, load_placed, release_memory
from job.stages.loop import TrainingFacts
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.evaluate import evaluate
from job.tune.model.adapter import load_with_peft
from job.tune.model.config import read_wrapper
from job.tune.world import ALONE, Order, World

_SAME_LOSS = 1e-6
"""Relative difference that the proof accepts: the same kernels on the same numbers."""
_NEAR_LOSS = 1e-2
"""The same with other micro-batches or on another device, where bf16 rounds elsewhere."""


def load_published(
    attempt: Attempt,
    inputs: Inputs,
    folder: Path,
    files: Mapping[str, FileEntry],
    *,
    left_to_peft: bool,
    rows: Rows,
    world: World = ALONE,
) -> PackedModel:
    """The adapter from the store, by PEFT, on a fresh 4-bit base; where that is sharded the others keep us company.

    Args:
        attempt: asked whether to stop while files arrive.
        inputs: the base and the run.
        folder: gets the adapter's files.
        files: what the store must give.
        left_to_peft: whether linear layers were PEFT's own in training: then they are here.
        rows: how documents stood in micro-batches.
        world: the others.
    """
    shutil.rmtree(folder, ignore_errors=True)
    inputs.artifacts.fetch_adapter(folder, files, should_stop=attempt.worker.should_stop)
    release_memory(inputs.device)
    if inputs.placement == "sharded":
        world.order(Order.PROVE)
    base, sharded = load_placed(inputs, world, attempt.phases.on_beat)
    model = PackedModel(load_with_peft(base, folder, read_wrapper(inputs.base.folder)), sharded)
    if left_to_peft:
        model.linears.leave_to_peft()
    if rows != model.rows:
        model.take_rows(rows)
    return model.eval()


def prove(attempt: Attempt, inputs: Inputs, facts: TrainingFacts, model: PackedModel, *, step: int) -> float:
    """Validation loss of the published adapter, compared with what was measured in training.

    Raises:
        SickDeviceError: it is another one.
    """
    proven = evaluate(
        model,
        inputs.dataset.validation,
        step=step,
        tokens_at_once=facts.progress.cut.evaluation_tokens,
        should_stop=attempt.worker.should_stop,
        on_progress=lambda done: attempt.phases.progress(evaluated=done),
    ).loss
    reported = facts.progress.evaluations[step].loss
    if abs(proven - reported) > _SAME_LOSS * abs(reported):
        attempt.notes.append(_explained(facts, proven, reported))
    return proven


def _explained(facts: TrainingFacts, proven: float, reported: float) -> str:
    shrunk = facts.progress.cut.evaluation_tokens != facts.memory.cut.evaluation_tokens
    if (shrunk or not facts.resume_exact) and abs(proven - reported) <= _NEAR_LOSS * abs(reported):
        where = "with smaller passes" if shrunk else "on this device"
        return f"the adapter gives a validation loss of {proven:.6f} {where}, {reported:.6f} in training"
    raise SickDeviceError(
        f"the adapter as downloaded again gives a validation loss of {proven:.6f}, but {reported:.6f} was measured in "
        "training: the store or the memory of this machine changed it; start the same job again"
    )
