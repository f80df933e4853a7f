"""What is decided once base and data are there: which engine trains, the course, how a batch is cut."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from job.core.data.mixture import portions
from job.core.plan.course import Course, course_of
from job.core.plan.cut import MemoryPlan, plan_memory
from job.core.plan.memory import AdapterShape, DeviceMemory, WantedEngine
from job.core.plan.shares import shares_of
from job.core.recipe.schema import Recipe
from job.stages.attempt import Phases
from job.stages.base.loading import Inputs
from job.tune.data.trial_documents import text_of
from job.tune.engines.choice import Choice, choose_engine
from job.tune.engines.packed_model import PackedModel
from job.tune.model.adapter import parameter_counts
from job.tune.model.config import read_config, shape_of
from job.tune.model.four_bit import left_whole

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """How this attempt trains."""

    choice: Choice
    course: Course
    memory: MemoryPlan
    layers: int
    """The decoder's."""


def plan_training(  # noqa: PLR0913 - as a memory plan
    model: PackedModel,
    inputs: Inputs,
    recipe: Recipe,
    *,
    engine: WantedEngine,
    backward: Callable[..., Any],
    free: DeviceMemory,
    phases: Phases,
    shards: int = 1,
    ranks: int = 1,
) -> Planned:
    """Choose the engine by trying it, and the cut by what was free before the model was loaded.

    Args:
        model: base and adapter, on the device.
        inputs: with the documents to train on.
        recipe: the batches, the adapter, the optimizer.
        engine: as asked for.
        backward: accelerate's, for the engine that goes by autograd.
        free: the device's memory.
        phases: the clock.
        shards: GPUs that the base is spread over; 1: it is whole.
        ranks: processes that make each step together.

    Raises:
        UsageError: the engine that is asked for does not know this model or device.
    """
    documents, train = inputs.dataset.train, recipe.train
    with phases.phase("self_test"):  # the kernels that it compares are compiled here
        choice = choose_engine(model, engine, backward=backward, text=text_of(documents))
    course = course_of(train, examples=portions(recipe.data, inputs.dataset.report.train.used_by_source))
    shape = shape_of(read_config(inputs.base.folder), left_whole(model.model.get_base_model()))
    adapter = AdapterShape(
        parameters=parameter_counts(model.model)[0],
        rank=recipe.lora.r,
        optimizer=train.optimizer,
        by_peft=choice.left_to_peft,
        on_experts=recipe.lora.on_experts,
    )
    memory = plan_memory(
        shape,
        adapter,
        engine=choice.name,
        compiled=choice.compiled,
        rows=model.rows,
        device=free,
        max_length=documents.max_length,
        shards=shards,
        shares=shares_of(course, documents.lengths, ranks=ranks),
    )
    log.info(
        "plan",
        steps=course.steps,
        epochs=round(course.epochs, 3),
        batch_size=train.batch_size,
        **asdict(memory.cut),
        placement=inputs.placement,
        engine_reason=choice.reason,
        reason=memory.reason,
    )
    return Planned(choice=choice, course=course, memory=memory, layers=shape.layers)
