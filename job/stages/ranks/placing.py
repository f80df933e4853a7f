"""Where the base goes: rank 0 decides it by its own GPU; one to be sharded is put into 4 bits before it is loaded."""

from dataclasses import replace

import structlog

from job.core.plan.memory import AdapterShape, Placement
from job.core.plan.placement import Placed, place
from job.stages.attempt import Attempt
from job.stages.base.loading import Inputs
from job.stages.ranks.company import Company
from job.tune.device.device import device_memory
from job.tune.engines.families import is_packed, is_supported
from job.tune.model.adapter import refuse_targets
from job.tune.model.config import empty_model, read_config, shape_of
from job.tune.model.sharded.layers import reason_against_sharding

log = structlog.get_logger(__name__)


def place_base(attempt: Attempt, inputs: Inputs, company: Company) -> Inputs:
    """The same, with the base's placement, and with its copy in 4 bits where shards are read from that.

    Args:
        attempt: this process.
        inputs: base and data.
        company: the others.

    Raises:
        UsageError: it is asked for shards, and this base or this number of processes does not allow them.
        JobError: as `BaseSource.make_copy`.
    """
    if company.size == 1:
        return inputs
    placement: Placement = company.as_rank_0_decides("placement", lambda: _decide(attempt, inputs, company.size))
    if placement == "sharded":
        with attempt.phases.phase("keep_copy"):
            base = inputs.source.make_copy(  # by the first process of a node; the others find it
                inputs.base,
                device=inputs.device,
                on_beat=attempt.phases.on_beat,
                on_progress=attempt.phases.fetched,
            )
        inputs = replace(inputs, base=base)
    return replace(inputs, placement=placement)


def _decide(attempt: Attempt, inputs: Inputs, ranks: int) -> Placement:
    worker, config = attempt.worker, read_config(inputs.base.folder)
    lora = worker.recipe.lora
    model = empty_model(config)
    placed: Placed = place(
        shape_of(config),
        AdapterShape(
            parameters=refuse_targets(config, lora),
            rank=lora.r,
            optimizer=worker.recipe.train.optimizer,
            on_experts=lora.on_experts,
        ),
        engine="fast" if worker.engine != "generic" and is_supported(config) else "generic",
        device=device_memory(inputs.device),
        max_length=inputs.dataset.train.max_length,
        ranks=ranks,
        wanted=worker.placement,
        against=reason_against_sharding(model, packed=is_packed(model)),
    )
    log.info("placement", placement=placed.placement, reason=placed.reason)
    return placed.placement
