"""The proof: the adapter as anybody would get it, from the store, gives the loss that was measured in training."""

import gc
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from job.core.errors import SickDeviceError
from job.core.verdict import Evaluation
from job.edge.store.folder import FileEntry
from job.stages.attempt import Attempt
from job.stages.loading import Inputs
from job.stages.loop import TrainingFacts
from job.tune.device.compute_dtype import compute_dtype
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.evaluate import evaluate
from job.tune.model.adapter import load_with_peft
from job.tune.model.base import load_base
from job.tune.model.config import read_wrapper

_SAME_LOSS = 1e-6
"""Relative difference that the proof accepts: the same kernels on the same numbers."""
_NEAR_LOSS = 1e-2
"""The same with other micro-batches or on another device, where bf16 rounds elsewhere."""


def load_published(
    attempt: Attempt, inputs: Inputs, folder: Path, files: Mapping[str, FileEntry], *, left_to_peft: bool
) -> PackedModel:
    """The adapter from the store, by PEFT, on a fresh 4-bit base.

    Args:
        attempt: asked whether to stop while files arrive.
        inputs: the base and the run.
        folder: gets the adapter's files.
        files: what the store must give.
        left_to_peft: whether linear layers were PEFT's own in training: then they are here.
    """
    shutil.rmtree(folder, ignore_errors=True)
    inputs.artifacts.fetch_adapter(folder, files, should_stop=attempt.worker.should_stop)
    return load_from(inputs, folder, left_to_peft=left_to_peft)


def load_from(inputs: Inputs, folder: Path, *, left_to_peft: bool) -> PackedModel:
    """A published adapter that lies in a folder, as `load_published`."""
    gc.collect()
    if inputs.device.type == "cuda":
        torch.cuda.empty_cache()
    base = load_base(inputs.base.folder, device=inputs.device, dtype=compute_dtype(inputs.device))
    model = PackedModel(load_with_peft(base, folder, read_wrapper(inputs.base.folder)))
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
    if abs(proven - reported) > _SAME_LOSS * abs(reported):
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
