"""From a base and a dataset to a trained adapter: load, plan, resume, ask the base, train."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import structlog

from job.core.base.servers import refusals
from job.stages.attempt import Attempt
from job.stages.base.loading import Inputs
from job.stages.committing import Committer
from job.stages.loop import Loop, TrainingFacts
from job.stages.planning import Planned
from job.stages.preparing import Prepared, make_stepper, prepare, questions_of
from job.stages.ranks.company import Company
from job.stages.resuming import Resumed, resume
from job.stages.teller import StepTeller
from job.stages.tracking import Tracked
from job.tune.engines.engine import adopt_or_shrink
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.checkpoint import Progress, State, adapter_to_publish
from job.tune.loop.evaluate import Question, answer
from job.tune.loop.sharing import share_state
from job.tune.model.adapter import parameter_counts
from job.tune.model.config import read_wrapper
from job.tune.model.four_bit import form_of
from job.tune.world import ALONE, Order, World

log = structlog.get_logger(__name__)


class TrainingStage:
    """One attempt at training, stage by stage."""

    def __init__(self, attempt: Attempt, inputs: Inputs, company: Company, tracked: Tracked) -> None:
        self._attempt = attempt
        self._company = company
        self._tracked = tracked
        self._world: World = ALONE
        self._recipe = attempt.worker.recipe
        self._inputs = inputs
        run_id = inputs.artifacts.run_id
        self._scratch = attempt.worker.run_folder(run_id) / "checkpoints" / f"a{inputs.attempt_number:02d}"

    def run(self) -> TrainingFacts:
        """Train to the end.

        Raises:
            JobError: as the stages do; what is committed stays committed.
        """
        if self._inputs.placement == "sharded":  # a base of which each holds a part needs all of us to be loaded
            with self._attempt.phases.phase("join"):
                self._world = self._company.join(self._inputs.device)
            self._world.order(Order.LOAD)
        company = self._company
        ready = prepare(self._attempt, self._inputs, on_loaded=company.loaded, world=self._world, ranks=company.size)
        self._notice_idle_ranks()
        ready.state.progress.ranks = self._company.size
        ready.state.progress.nodes_that_sum = self._company.nodes_that_sum
        facts = self._facts(ready.model, ready.state, ready.planned, self._resume(ready.state, ready.planned))
        if self._company.size > 1:
            with self._attempt.phases.phase("join"):
                self._world = self._company.join(self._inputs.device)
                if ready.model.sharded is not None:  # it may go on from where each GPU held the whole base
                    ready.state.progress.cut = replace(ready.state.progress.cut, kept_layers=0)
                share_state(self._world, ready.state, ready.adapter)
        self._adopt(ready.planned, facts)
        self._train(ready, facts)
        if ready.model.sharded is not None:
            ready.model.sharded.close()
        return facts

    def _notice_idle_ranks(self) -> None:
        ranks, examples = self._company.size, self._recipe.train.batch_size
        if examples < ranks:
            reason = (
                f"a step has {examples} examples (train.batch_size), fewer than the {ranks} processes that make it: "
                f"{ranks - examples} of them have no work; give fewer GPUs, or a larger batch"
            )
            log.warning("idle_ranks", reason=reason)
            self._attempt.notes.append(reason)

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
        inputs = self._inputs
        questions = questions_of(inputs, self._recipe, should_stop=self._attempt.worker.should_stop)
        trained, total = parameter_counts(model.model)
        architecture, wrapper = type(model.model.get_base_model()).__name__, read_wrapper(inputs.base.folder)
        return TrainingFacts(
            progress=state.progress,
            course=planned.course,
            memory=planned.memory,
            engine_reason=planned.choice.reason,
            left_to_peft=planned.choice.left_to_peft,
            rows=model.rows,
            questions=questions,
            architecture=architecture if wrapper is None else f"{wrapper.architecture} (its decoder: {architecture})",
            left_out=None if wrapper is None else wrapper.left_out_words(),
            form=form_of(model.model),
            trainable_parameters=trained,
            total_parameters=total,
            resumed=resumed,
            adapter=adapter_to_publish(model.model, wrapper),
            nodes=self._company.nodes,
            placement=inputs.placement,
            refused_by=tuple(refusals(self._recipe.lora, rows=model.model.config.vocab_size)),
        )

    def _adopt(self, planned: Planned, facts: TrainingFacts) -> None:
        """Cut batches as planned; memory may have gone since."""
        engine, wanted = planned.choice.engine, facts.progress.cut
        facts.progress.cut = adopt_or_shrink(engine, wanted)
        facts.out_of_memory += facts.progress.cut != wanted
        engine.refresh()

    def _train(self, ready: Prepared, facts: TrainingFacts) -> None:
        """Ask the base, and carry the run to its end; what is committed is uploaded whatever happens."""
        attempt, inputs, state = self._attempt, self._inputs, ready.state
        with ExitStack() as ends:  # the last one first
            committer = Committer(attempt, inputs.artifacts, state, number=inputs.attempt_number, scratch=self._scratch)
            ends.enter_context(committer)
            self._tracked.begin(state.progress)
            self._ask_base(ready.model, state.progress, facts.questions)
            self._world.order(Order.PREPARE)
            stepper = make_stepper(attempt, inputs, ready, self._world)
            ends.enter_context(attempt.phases.phase("train"))
            loop = Loop(
                attempt,
                inputs,
                ready.planned,
                model=ready.model,
                stepper=stepper,
                committer=committer,
                teller=StepTeller(attempt, self._tracked.tracking),
                facts=facts,
                world=self._world,
            )
            loop.run()

    def _ask_base(self, model: PackedModel, progress: Progress, questions: Sequence[Question]) -> None:
        if progress.base_answers is not None and len(progress.base_answers) == len(questions):
            return
        self._world.order(Order.ANSWER)
        with self._attempt.phases.phase("ask_base"), model.model.disable_adapter():
            progress.base_answers = answer(
                model,
                questions,
                self._inputs.tokenizer,
                max_new_tokens=self._recipe.evaluate.max_new_tokens,
                seed=self._recipe.train.seed,
                should_stop=self._attempt.moves_on,  # asked after each token
                world=self._world,
            )
