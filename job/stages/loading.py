"""The model of an attempt: its 4-bit base, a copy of that for later starts, and a fresh adapter that can learn."""

from dataclasses import dataclass
from typing import Any

import structlog
import torch

from job.core.recipe import Recipe
from job.core.run_record import RecordedParent
from job.edge.base.fetching import BaseModel
from job.edge.run.artifacts import Artifacts
from job.stages.attempt import Phases
from job.stages.base_source import BaseSource
from job.stages.dataset import Dataset
from job.tune.device.compute_dtype import compute_dtype
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model, check_whole, text_of
from job.tune.model.adapter import attach_lora, parameter_counts, trainable
from job.tune.model.base import load_base
from job.tune.model.config import read_wrapper

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What training starts from."""

    base: BaseModel
    source: BaseSource
    """Where the base came from."""
    tokenizer: Any
    dataset: Dataset
    artifacts: Artifacts
    attempt_number: int
    device: torch.device
    parent: RecordedParent | None = None
    """The adapter that the run starts from; None: none, the base alone."""


def load_model(inputs: Inputs, recipe: Recipe, phases: Phases) -> PackedModel:
    """Base and adapter on the device, checked on a few documents.

    Raises:
        DataError: the base's weights cannot be read.
        UsageError: the recipe's targets or the base's architecture cannot be trained.
    """
    base = load_base(inputs.base.folder, device=inputs.device, dtype=compute_dtype(inputs.device))
    if not inputs.base.quantised:
        with phases.phase("keep_copy"):
            inputs.source.keep(base, inputs.base, phases.on_beat)
    identity = inputs.base.identity
    adapted = attach_lora(
        base, recipe.lora, source=identity.source, revision=recipe.model.revision, seed=recipe.train.seed
    )
    model = PackedModel(adapted)
    with phases.phase("self_test"):
        text = text_of(inputs.dataset.train)
        check_model(model, text)
        check_whole(model, read_wrapper(inputs.base.folder), text)
    trained, total = parameter_counts(adapted)
    log.info(
        "model",
        base=identity.source,
        revision=identity.revision,
        trainable_parameters=trained,
        total_parameters=total,
        adapter_dtype=str(trainable(model)[0].dtype),
    )
    return model
