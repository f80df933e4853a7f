"""What every process of a run does before its first step: load the model, plan, a fresh state, a stepper."""

from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator

from job.core.crash_points import crash_point
from job.core.recipe.schema import Recipe
from job.stages.attempt import Attempt
from job.stages.base.loading import Inputs, load_model
from job.stages.nightly.lineage import start_from_parent
from job.stages.planning import Planned, plan_training
from job.tune.data.chats.chat import ChatTemplates, asked_rules
from job.tune.data.frame import token_rules
from job.tune.device.device import device_memory
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.checkpoint import Progress, State
from job.tune.loop.evaluate import Question, questions_of_documents, questions_of_prompts
from job.tune.loop.flat import FlatAdapter
from job.tune.loop.optimizer import make_optimizer, make_scheduler
from job.tune.loop.step import Stepper
from job.tune.loop.track import make_accelerator
from job.tune.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A model that can be trained, at its start."""

    model: PackedModel
    accelerator: Accelerator
    planned: Planned
    adapter: FlatAdapter
    state: State


def prepare(attempt: Attempt, inputs: Inputs, *, on_loaded: Callable[[], None], world: World, ranks: int) -> Prepared:
    """Load and plan.

    Args:
        attempt: this process.
        inputs: base and data.
        on_loaded: called once the base stands on the device, and its copy in 4 bits on the disk.
        world: who else holds a part of the base, where it is sharded.
        ranks: processes that will make each step together.

    Raises:
        JobError: as the stages do.
    """
    recipe, phases = attempt.worker.recipe, attempt.phases
    with phases.phase("load_model"):
        free = device_memory(inputs.device)
        model = load_model(inputs, recipe, phases, world)
        start_from_parent(attempt, inputs, model)
        on_loaded()
        accelerator = make_accelerator(on_cpu=inputs.device.type == "cpu")
        planned = plan_training(
            model,
            inputs,
            recipe,
            engine=attempt.worker.engine,
            backward=accelerator.backward,
            free=free,
            phases=phases,
            shards=1 if model.sharded is None else world.size,
            ranks=ranks,
        )
        crash_point("model.loaded")
        adapter = FlatAdapter(model)
    optimizer = make_optimizer(adapter.vectors, recipe.train)
    state = State(
        model=model.model,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, recipe.train, steps=planned.course.steps),
        progress=Progress(cut=planned.memory.cut),
    )
    return Prepared(model=model, accelerator=accelerator, planned=planned, adapter=adapter, state=state)


def questions_of(inputs: Inputs, recipe: Recipe, *, should_stop: Callable[[], bool]) -> list[Question]:
    """What base and tuned model are asked."""
    evaluation, judged = recipe.evaluate, recipe.data.held_out_sources or recipe.data.sources
    asked = [place for place, source in enumerate(judged) if source.data.has_prompt]
    questions = questions_of_documents(
        inputs.dataset.validation, inputs.tokenizer, most=evaluation.answers, sources=asked
    )
    if not evaluation.prompts:
        return questions
    rules = token_rules(inputs.tokenizer, recipe.data)
    chat = asked_rules(inputs.tokenizer, recipe.data)
    with ChatTemplates(should_stop=should_stop) as chats:
        template = None if chat is None else chats.of(chat)
        return questions_of_prompts(evaluation.prompts, rules, template) + questions


def make_stepper(attempt: Attempt, inputs: Inputs, ready: Prepared, world: World) -> Stepper:
    """For the steps from where the state stands, with what they run compiled."""
    ready.model.train()
    planned, progress = ready.planned, ready.state.progress
    stepper = Stepper(
        engine=planned.choice.engine,
        adapter=ready.adapter,
        state=ready.state,
        documents=inputs.dataset.train,
        course=planned.course,
        accelerator=ready.accelerator,
        train=attempt.worker.recipe.train,
        layers=planned.layers,
        world=world,
    )
    compile_first(attempt, stepper, progress, planned)
    return stepper


def compile_first(attempt: Attempt, stepper: Stepper, progress: Progress, planned: Planned) -> None:
    """Compile what the steps run, where there are any and layers are compiled."""
    if progress.cut.compiled and progress.step < planned.course.steps:
        with attempt.phases.phase("compile"):
            stepper.compile_ahead(progress.step + 1)
