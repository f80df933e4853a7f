"""The proof: the adapter as anybody would get it, from the store, gives the loss that was measured in training."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.core.data.packing import Rows
from job.core.errors import SickDeviceError
from job.core.judging.verdict import Evaluation
from job.edge.store.folder import FileEntry
from job.stages.attempt import Attempt
from job.stages.base.loading import Inputs, load_placed
from job.stages.loop import TrainingFacts
from job.tune.data.trial_documents import text_of
from job.tune.device.device import release_memory
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import find_rows
from job.tune.loop.evaluate import evaluate
from job.tune.model.adapter import load_with_peft
from job.tune.model.config import read_wrapper
from job.tune.model.sharded.layers import ShardedLayers
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
    return load_from(attempt, inputs, folder, left_to_peft=left_to_peft, rows=rows, world=world)


def load_from(
    attempt: Attempt, inputs: Inputs, folder: Path, *, left_to_peft: bool, rows: Rows | None, world: World
) -> PackedModel:
    """A published adapter that lies in a folder, as `load_published`; rows None: that is found by trying."""
    base, sharded = load_alone(attempt, inputs, world)
    model = PackedModel(load_with_peft(base, folder, read_wrapper(inputs.base.folder)), sharded)
    return as_judged(model, inputs, left_to_peft=left_to_peft, rows=rows)


def load_alone(attempt: Attempt, inputs: Inputs, world: World) -> tuple[Any, ShardedLayers | None]:
    """A fresh base for this process alone; where it is sharded the others send their shards until `let_go`."""
    release_memory(inputs.device)
    if inputs.placement == "sharded":
        world.order(Order.PROVE)
    return load_placed(inputs, world, attempt.phases.on_beat)


def let_go(model: PackedModel, world: World) -> None:
    """Nobody needs anybody's shards of this model any more."""
    if model.sharded is not None:
        world.agree(go=True)
        model.sharded.close()


def as_judged(model: PackedModel, inputs: Inputs, *, left_to_peft: bool, rows: Rows | None) -> PackedModel:
    """With rows that are right, and with PEFT's own layers where it is not known that ours are."""
    if rows is None:
        find_rows(model, text_of(inputs.dataset.train))
    elif rows != model.rows:
        model.take_rows(rows)
    if left_to_peft:
        model.linears.leave_to_peft()
    return model.eval()


def prove(attempt: Attempt, inputs: Inputs, facts: TrainingFacts, model: PackedModel, *, step: int) -> Evaluation:
    """The held-out examples by the published adapter, compared with what was measured in training.

    Raises:
        SickDeviceError: it is another one.
    """
    evaluation = evaluate(
        model,
        inputs.dataset.validation,
        step=step,
        tokens_at_once=facts.progress.cut.evaluation_tokens,
        should_stop=attempt.worker.should_stop,
        on_progress=lambda done: attempt.phases.progress(evaluated=done),
    )
    proven, reported = evaluation.loss, facts.progress.evaluations[step].loss
    if not abs(proven - reported) <= _SAME_LOSS * abs(reported):  # so that NaN fails too
        attempt.notes.append(_explained(facts, proven, reported))
    return evaluation


def _explained(facts: TrainingFacts, proven: float, reported: float) -> str:
    shrunk = facts.progress.cut.evaluation_tokens != facts.memory.cut.evaluation_tokens
    if (shrunk or not facts.resume_exact) and abs(proven - reported) <= _NEAR_LOSS * abs(reported):
        where = "with smaller passes" if shrunk else "on this device"
        return f"the adapter gives a validation loss of {proven:.6f} {where}, {reported:.6f} in training"
    raise SickDeviceError(
        f"the adapter as downloaded again gives a validation loss of {proven:.6f}, but {reported:.6f} was measured in "
        "training: the store or the memory of this machine changed it; start the same job again"
    )
