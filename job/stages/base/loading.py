"""The model of an attempt: its 4-bit base, a copy of that for later starts, and a fresh adapter that can learn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from job.core.attempt.run_record import RecordedParent
from job.core.plan.memory import Placement
from job.core.recipe.schema import Recipe
from job.edge.base.fetching import BaseModel
from job.edge.run.artifacts import Artifacts
from job.stages.attempt import Phases
from job.stages.base.base_source import BaseSource
from job.stages.data.dataset import Dataset
from job.tune.data.trial_documents import text_of
from job.tune.device.compute_dtype import compute_dtype
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model, check_whole
from job.tune.model.adapter import attach_lora, parameter_counts, trainable
from job.tune.model.base import load_base
from job.tune.model.config import read_wrapper
from job.tune.model.sharded.layers import ShardedLayers
from job.tune.ranks import Ranks
from job.tune.world import World

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
    placement: Placement = "replicated"
    """Where the base goes."""
    parent: RecordedParent | None = None
    """The adapter that the run starts from; None: none, the base alone."""


def load_placed(inputs: Inputs, world: World, on_beat: Callable[[], None]) -> tuple[Any, ShardedLayers | None]:
    """The base on the device; where it is sharded our part of it, and where the rest comes from.

    Raises:
        DataError: the base's weights cannot be read.
        SickDeviceError: shards do not arrive as they are in the files.
        PeerLostError: another rank is gone, of those that hold shards.
    """
    device, is_sharded = inputs.device, inputs.placement == "sharded"
    base = load_base(inputs.base.folder, device=device, dtype=compute_dtype(device), on_host=is_sharded)
    if not is_sharded:
        return base, None
    assert isinstance(world, Ranks), "who is alone holds the whole base"
    sharded = ShardedLayers(base, world, device, on_beat=on_beat)
    log.info("shards", ranks=world.size, bytes=sharded.device_bytes)
    return base, sharded


def load_model(inputs: Inputs, recipe: Recipe, phases: Phases, world: World) -> PackedModel:
    """Base and adapter on the device, checked on a few documents.

    Raises:
        UsageError: the recipe's targets or the base's architecture cannot be trained.
        JobError: as `load_placed`.
    """
    base, sharded = load_placed(inputs, world, phases.on_beat)
    if not inputs.base.quantised and sharded is None:
        with phases.phase("keep_copy"):
            inputs.source.keep(base, inputs.base, phases.on_beat)
    identity = inputs.base.identity
    adapted = attach_lora(
        base, recipe.lora, source=identity.source, revision=recipe.model.revision, seed=recipe.train.seed
    )
    model = PackedModel(adapted, sharded)
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
