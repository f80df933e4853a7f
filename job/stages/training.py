"""From a base and a dataset to a trained adapter: load, plan, resume, ask the base, train."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import structlog
from accelerate import Accelerator

from job.core.crash_points import crash_point
from job.core.recipe import Recipe
from job.stages.attempt import Attempt
from job.stages.committing import Committer
from job.stages.lineage import start_from_parent
from job.stages.loading import Inputs, load_model
from job.stages.loop import Loop, TrainingFacts
from job.stages.planning import Planned, plan_training
from job.stages.resuming import Resumed, resume
from job.stages.teller import StepTeller
from job.tune.data.chat import ChatTemplates, asked_rules
from job.tune.data.frame import token_rules
from job.tune.device.device import device_memory
from job.tune.engines.engine import adopt_or_shrink
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.checkpoint import Progress, State, adapter_to_publish
from job.tune.loop.evaluate import Question, answer, questions_of_documents, questions_of_prompts
from job.tune.loop.flat import FlatAdapter
from job.tune.loop.optimizer import make_optimizer, make_scheduler
from job.tune.loop.step import Stepper
from job.tune.loop.track import Tracking, make_accelerator
from job.tune.model.adapter import parameter_counts
from job.tune.model.config import read_wrapper
from job.tune.model.four_bit import form_of

log = structlog.get_logger(__name__)


class TrainingStage:
    """One attempt at training, stage by stage."""

    def __init__(self, attempt: Attempt, inputs: Inputs) -> None:
        self._attempt = attempt
        self._recipe: Recipe = attempt.worker.recipe
        self._inputs = inputs
        run_id = inputs.artifacts.run_id
        self._scratch = attempt.worker.run_folder(run_id) / "checkpoints" / f"a{inputs.attempt_number:02d}"
        self._trackers_folder = attempt.worker.workdir / "trackers" / run_id
        """Not in the run's own folder, which goes when the run is done."""

    def run(self) -> TrainingFacts:
        """Train to the end.

        Raises:
            JobError: as the stages do; what is committed stays committed.
        """
        inputs, phases = self._inputs, self._attempt.phases
        with phases.phase("load_model"):
            free = device_memory(inputs.device)
            model = load_model(inputs, self._recipe, phases)
            start_from_parent(self._attempt, inputs, model)
            accelerator = make_accelerator(
                self._recipe.track, on_cpu=inputs.device.type == "cpu", folder=self._trackers_folder
            )
            planned = plan_training(
                model,
                inputs,
                self._recipe,
                engine=self._attempt.worker.engine,
                backward=accelerator.backward,
                free=free,
                phases=phases,
            )
            crash_point("model.loaded")
            adapter = FlatAdapter(model)
        state = self._fresh_state(model, adapter, planned)
        facts = self._facts(model, state, planned, self._resume(state, planned))
        self._adopt(planned, facts)
        self._train(model, adapter, state, planned, facts, accelerator)
        return facts

    def _fresh_state(self, model: PackedModel, adapter: FlatAdapter, planned: Planned) -> State:
        optimizer = make_optimizer(adapter.vectors, self._recipe.train)
        return State(
            model=model.model,
            optimizer=optimizer,
            scheduler=make_scheduler(optimizer, self._recipe.train, steps=planned.course.steps),
            progress=Progress(cut=planned.memory.cut),
        )

    def _resume(self, state: State, planned: Planned) -> Resumed:
        attempt, artifacts = self._attempt, self._inputs.artifacts
        with attempt.phases.phase("resume"):
            resumed = resume(
                state,
                artifacts,
                self._recipe,
                self._scratch,
                layers=planned.layers,
                targets=self._inputs.dataset.validation.targets,
                sources=len(planned.course.mixture.sizes),
                should_stop=attempt.worker.should_stop,
            )
        if resumed.checkpoint is not None:
            step = resumed.checkpoint.step
            attempt.standing.step = attempt.standing.from_step = step
            attempt.committed(step)
            log.info("resumed", checkpoint=resumed.checkpoint.name, step=step, of=planned.course.steps)
        hidden = tuple(each | {"reason": attempt.hide(each["reason"])} for each in resumed.passed_over)
        return replace(resumed, passed_over=hidden)

    def _facts(self, model: PackedModel, state: State, planned: Planned, resumed: Resumed) -> TrainingFacts:
        inputs, evaluation = self._inputs, self._recipe.evaluate
        judged = self._recipe.data.held_out_sources or self._recipe.data.sources
        asked = [place for place, source in enumerate(judged) if source.data.has_prompt]
        questions = questions_of_documents(
            inputs.dataset.validation, inputs.tokenizer, most=evaluation.answers, sources=asked
        )
        if evaluation.prompts:
            rules = token_rules(inputs.tokenizer, self._recipe.data)
            chat = asked_rules(inputs.tokenizer, self._recipe.data)
            with ChatTemplates(should_stop=self._attempt.worker.should_stop) as chats:
                template = None if chat is None else chats.of(chat)
                questions = questions_of_prompts(evaluation.prompts, rules, template) + questions
        trained, total = parameter_counts(model.model)
        architecture, wrapper = type(model.model.get_base_model()).__name__, read_wrapper(inputs.base.folder)
        return TrainingFacts(
            progress=state.progress,
            course=planned.course,
            memory=planned.memory,
            engine_reason=planned.choice.reason,
            left_to_peft=planned.choice.left_to_peft,
            questions=questions,
            architecture=architecture if wrapper is None else f"{wrapper.architecture} (its decoder: {architecture})",
            left_out=None if wrapper is None else wrapper.left_out_words(),
            form=form_of(model.model),
            trainable_parameters=trained,
            total_parameters=total,
            resumed=resumed,
            adapter=adapter_to_publish(model.model, wrapper),
        )

    def _adopt(self, planned: Planned, facts: TrainingFacts) -> None:
        """Cut batches as planned; memory may have gone since."""
        engine, wanted = planned.choice.engine, facts.progress.cut
        facts.progress.cut = adopt_or_shrink(engine, wanted)
        facts.out_of_memory += facts.progress.cut != wanted
        engine.refresh()

    def _train(
        self,
        model: PackedModel,
        adapter: FlatAdapter,
        state: State,
        planned: Planned,
        facts: TrainingFacts,
        accelerator: Accelerator,
    ) -> None:
        """Ask the base, and carry the run to its end; what is committed is uploaded whatever happens."""
        attempt, inputs = self._attempt, self._inputs
        with ExitStack() as ends:  # the last one first
            ends.callback(self._publish_tensorboard)
            committer = Committer(attempt, inputs.artifacts, state, number=inputs.attempt_number, scratch=self._scratch)
            ends.enter_context(committer)
            tracking = self._begin_tracking(accelerator)
            ends.callback(tracking.end)
            self._ask_base(model, state.progress, facts.questions)
            model.train()
            stepper = Stepper(
                engine=planned.choice.engine,
                adapter=adapter,
                state=state,
                documents=inputs.dataset.train,
                course=planned.course,
                accelerator=accelerator,
                train=self._recipe.train,
                layers=planned.layers,
            )
            self._compile(stepper, state.progress, planned)
            ends.enter_context(attempt.phases.phase("train"))
            loop = Loop(
                attempt,
                inputs,
                planned,
                model=model,
                stepper=stepper,
                committer=committer,
                teller=StepTeller(attempt, tracking),
                facts=facts,
            )
            loop.run()

    def _compile(self, stepper: Stepper, progress: Progress, planned: Planned) -> None:
        if progress.cut.compiled and progress.step < planned.course.steps:
            with self._attempt.phases.phase("compile"):
                stepper.compile_ahead(progress.step + 1)

    def _ask_base(self, model: PackedModel, progress: Progress, questions: Sequence[Question]) -> None:
        if progress.base_answers is not None and len(progress.base_answers) == len(questions):
            return
        with self._attempt.phases.phase("ask_base"), model.model.disable_adapter():
            progress.base_answers = answer(
                model,
                questions,
                self._inputs.tokenizer,
                max_new_tokens=self._recipe.evaluate.max_new_tokens,
                seed=self._recipe.train.seed,
                should_stop=self._attempt.moves_on,  # asked after each token
            )

    # --- trackers ----------------------------------------------------------------------------------------------------

    def _begin_tracking(self, accelerator: Accelerator) -> Tracking:
        def on_failure(reason: str) -> None:
            log.warning("tracking_stopped", reason=reason)
            self._attempt.notes.append(reason)

        tracking = Tracking(accelerator, self._recipe.track, on_failure=on_failure)
        tracking.begin(run_id=self._inputs.artifacts.run_id, folder=self._trackers_folder, facts=_tracked(self._recipe))
        return tracking

    def _publish_tensorboard(self) -> None:
        """Bring TensorBoard's event files to the store: this machine's disk may be gone tomorrow."""
        if "tensorboard" in self._recipe.track.trackers:
            events = sorted(path for path in self._trackers_folder.rglob("events.out.*") if path.is_file())
            with self._attempt.not_at_the_cost_of_the_run("TensorBoard's events"):
                self._inputs.artifacts.publish_events(events, attempt=self._inputs.attempt_number)
            shutil.rmtree(self._trackers_folder, ignore_errors=True)


def _tracked(recipe: Recipe) -> dict[str, Any]:
    """The recipe's numbers as trackers show them: flat."""
    return {
        "base": recipe.model.base,
        "learning_rate": recipe.train.learning_rate,
        "batch_size": recipe.train.batch_size,
        "optimizer": recipe.train.optimizer,
        "schedule": recipe.train.schedule,
        "lora_r": recipe.lora.r,
        "lora_alpha": recipe.lora.alpha,
        "lora_dropout": recipe.lora.dropout,
    }
