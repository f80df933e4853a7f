"""What is decided once base and data are there: the path that trains, the course, how a batch is cut."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from accelerate import Accelerator

from job.core.course import Course, plan_course
from job.core.cut import MemoryPlan, plan_memory
from job.core.memory import AdapterShape, DeviceMemory
from job.stages.attempt import Attempt
from job.tune.data.documents import Documents
from job.tune.device.device import device_name
from job.tune.engines.choice import Choice, choose_path
from job.tune.engines.packed_model import PackedModel
from job.tune.model.adapter import parameter_counts
from job.tune.model.config import read_config, shape_of

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """How this attempt trains."""

    choice: Choice
    course: Course
    memory: MemoryPlan


def plan_training(
    attempt: Attempt,
    model: PackedModel,
    documents: Documents,
    accelerator: Accelerator,
    *,
    on_stopped: Callable[[str], None],
    base: Path,
    device: torch.device,
    memory: DeviceMemory,
) -> Planned:
    """Choose the path by trying it, and the cut by what was free before the model was loaded.

    Args:
        attempt: this process.
        model: base and adapter, on the device.
        documents: to train on.
        accelerator: whose way back autograd's is.
        on_stopped: told why layers that were compiled no longer are.
        base: the base's folder.
        device: what we compute on.
        memory: what was free.

    Raises:
        UsageError: the path that is asked for does not fit this model or device.
    """
    recipe = attempt.recipe
    with attempt.phases.phase("self_test"):  # of the engine's parts, whose kernels are compiled for it
        choice = choose_path(model, attempt.engine, backward=accelerator.backward, on_stopped=on_stopped)
    course = plan_course(
        examples=len(documents),
        batch_size=recipe.train.batch_size,
        steps=recipe.train.steps,
        epochs=recipe.train.epochs,
        seed=recipe.train.seed,
    )
    cut = plan_memory(
        shape_of(read_config(base)),
        AdapterShape(parameters=parameter_counts(model)[0], rank=recipe.lora.r, optimizer=recipe.train.optimizer),
        path=choice.name,
        compiled=choice.compiled,
        device=memory,
        max_length=documents.max_length,
        step_tokens=course.largest_step(documents.lengths),
    )
    log.info(
        "plan",
        steps=course.steps,
        epochs=round(course.epochs, 3),
        batch_size=recipe.train.batch_size,
        engine=choice.name,
        engine_reason=choice.reason,
        micro_batch_tokens=cut.micro_batch_tokens,
        kept_layers=cut.kept_layers,
        recomputed_layers=cut.recomputed_layers,
        reason=cut.reason,
        device=device_name(device),
    )
    return Planned(choice=choice, course=course, memory=cut)
