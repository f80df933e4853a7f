"""From a base and a dataset to a trained adapter: load, plan, resume, ask the base, train."""

import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import get_scheduler

from job.core.course import Course
from job.core.crash_points import crash_point
from job.core.cut import MemoryPlan
from job.core.errors import DivergedError, LocalDiskError
from job.core.verdict import Evaluation, judge
from job.edge.base.fetching import BaseModel
from job.edge.run.artifacts import Artifacts
from job.edge.run.checkpoints import Checkpoint
from job.edge.run.publisher import Publisher
from job.stages.attempt import Attempt
from job.stages.base_source import BaseSource, loaded_from
from job.stages.dataset import Dataset
from job.stages.planning import Planned, plan_training
from job.stages.teller import StepTeller
from job.tune.data.frame import token_rules
from job.tune.device.device import allocation_retries, device_memory, device_name
from job.tune.engines.engine import Path as GradientPath
from job.tune.engines.engine import settle
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model
from job.tune.loop import checkpoint as checkpoints
from job.tune.loop.checkpoint import Progress, Trained
from job.tune.loop.evaluate import Question, answer, evaluate, questions_of_documents, questions_of_prompts
from job.tune.loop.flat import FlatAdapter
from job.tune.loop.optimizer import make_optimizer
from job.tune.loop.step import Hooks, StepRecord, Trainer
from job.tune.loop.track import Tracking, make_accelerator
from job.tune.model.adapter import attach_lora, parameter_counts, trainable
from job.tune.model.base import load_base

log = structlog.get_logger(__name__)

_SETTLING_STEPS = 5
"""So many steps, of batches of unlike lengths, find the memory that they need."""
_SCHEDULE_ENDS = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "polynomial": {"lr_end": 0.0}}
"""Where a schedule ends, for those that ask: a tenth of the peak, and zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What training starts from."""

    base: BaseModel
    source: BaseSource
    """Where the base came from."""
    tokenizer: Any
    dataset: Dataset
    artifacts: Artifacts
    attempt_number: int
    device: torch.device


@dataclass(slots=True, kw_only=True)
class TrainedRun:
    """What training leaves for the report."""

    progress: Progress
    course: Course
    memory_plan: MemoryPlan
    engine_reason: str
    """Why this path computes the gradients."""
    questions: list[Question]
    architecture: str
    trainable_parameters: int
    total_parameters: int
    resumed_from: Checkpoint | None
    passed_over: list[dict[str, str]]
    step_seconds: list[float] = field(default_factory=list)
    """Of this attempt's steps."""
    start_seconds: dict[str, float] | None = None
    """From the process's start to the end of the attempt's first step, by phase; None: it made no step."""
    out_of_memory: int = 0
    allocation_retries: int = 0

    @property
    def resume_exact(self) -> bool:
        """Whether the numbers are to the bit those of an undisturbed run."""
        return not self.progress.changes

    @property
    def step_seconds_median(self) -> float:
        """0 when this attempt made no step."""
        return statistics.median(self.step_seconds) if self.step_seconds else 0.0


class Training:
    """One attempt at training, stage by stage."""

    def __init__(self, attempt: Attempt, setting: Setting) -> None:
        self._attempt = attempt
        self._setting = setting
        folder = attempt.workdir / "runs" / setting.artifacts.run_id / "checkpoints"
        self._scratch = folder / f"a{setting.attempt_number:02d}"
        self._earlier = [path for path in folder.glob("*") if path != self._scratch]
        """What earlier attempts could not upload: kept until there is something newer in the store."""
        self._committed_at = self._looked_at = time.monotonic()
        self._longest_micro_batch = 0.0
        """Seconds."""
        self._warned = False
        self._told_of_memory = False

    def run(self) -> TrainedRun:
        """Train to the end.

        Raises:
            JobError: as the stages do; what is committed stays committed.
        """
        attempt, setting, recipe = self._attempt, self._setting, self._attempt.recipe
        with attempt.phases.phase("load_model"):
            memory = device_memory(setting.device)
            progress = Progress()
            model = self._load()
            # Its folder is not in the run's own, which goes when the run is done.
            on_cpu = setting.device.type == "cpu"
            accelerator = make_accelerator(recipe.track, on_cpu=on_cpu, folder=self._trackers_folder)
            planned = plan_training(
                attempt,
                model,
                setting.dataset.train,
                accelerator,
                on_stopped=partial(self._on_no_longer_compiled, progress),
                base=setting.base.folder,
                device=setting.device,
                memory=memory,
            )
            crash_point("model.loaded")
            adapter = FlatAdapter(model)
        trained = self._prepare(model, adapter, planned, progress)
        run = self._describe(model, trained, planned)
        self._resume(trained, run)
        self._adopt(planned.choice.path, run)
        self._train(model, adapter, trained, planned, run, accelerator)
        return run

    def _adopt(self, path: GradientPath, run: TrainedRun) -> None:
        """Cut batches as planned; memory may have gone since."""
        if not settle(path, run.progress.plan):
            self._tell_out_of_memory(run)
        path.refresh()

    def _train(
        self,
        model: PackedModel,
        adapter: FlatAdapter,
        trained: Trained,
        planned: Planned,
        run: TrainedRun,
        accelerator: Accelerator,
    ) -> None:
        """Ask the base, and carry the run to its end; what is committed is uploaded whatever happens."""
        attempt, setting, recipe = self._attempt, self._setting, self._attempt.recipe
        tracking = self._begin_tracking(accelerator)
        publisher = Publisher(
            setting.artifacts,
            keep=recipe.checkpoint.keep,
            on_committed=self._on_committed,
            should_stop=attempt.should_stop,
            on_beat=attempt.phases.on_beat,
        )
        try:
            self._ask_base(model, trained.progress, run)
            with attempt.phases.phase("train"):
                hooks = self._hooks(model, trained, run, publisher, tracking)
                model.train()
                trainer = Trainer(
                    path=planned.choice.path,
                    adapter=adapter,
                    trained=trained,
                    documents=setting.dataset.train,
                    course=planned.course,
                    accelerator=accelerator,
                    train=recipe.train,
                    hooks=hooks,
                )
                trainer.run(recipe.checkpoint, recipe.evaluate)
        finally:
            tracking.end()
            with attempt.phases.phase("upload"):
                publisher.close()
            self._publish_tensorboard()

    def _begin_tracking(self, accelerator: Accelerator) -> Tracking:
        attempt = self._attempt

        def on_failure(reason: str) -> None:
            log.warning("tracking_stopped", reason=reason)
            attempt.notes.append(reason)

        tracking = Tracking(accelerator, attempt.recipe.track, on_failure=on_failure)
        tracking.begin(
            run_id=self._setting.artifacts.run_id, folder=self._trackers_folder, facts=_facts(attempt.recipe)
        )
        return tracking

    @property
    def _trackers_folder(self) -> Path:
        return self._attempt.workdir / "trackers" / self._setting.artifacts.run_id

    def _publish_tensorboard(self) -> None:
        """Bring TensorBoard's event files to the store: this machine's disk may be gone tomorrow."""
        if "tensorboard" in self._attempt.recipe.track.trackers:
            events = sorted(path for path in self._trackers_folder.rglob("events.out.*") if path.is_file())
            self._setting.artifacts.publish_events(events, attempt=self._setting.attempt_number)
            shutil.rmtree(self._trackers_folder, ignore_errors=True)

    def _load(self) -> PackedModel:
        setting, recipe = self._setting, self._attempt.recipe
        base = load_base(setting.base.folder, device=setting.device)
        if not setting.base.quantised:
            with self._attempt.phases.phase("keep_copy"):
                setting.source.keep(base, setting.base, self._attempt.phases.on_beat)
        identity = setting.base.identity
        model = PackedModel(
            attach_lora(
                base, recipe.lora, source=identity.source, revision=recipe.model.revision, seed=recipe.train.seed
            )
        )
        with self._attempt.phases.phase("self_test"):
            check_model(model)
        counts = parameter_counts(model)
        log.info(
            "model",
            base=identity.source,
            revision=identity.revision,
            trainable_parameters=counts[0],
            total_parameters=counts[1],
            adapter_dtype=str(trainable(model)[0].dtype),
        )
        return model

    def _prepare(self, model: PackedModel, adapter: FlatAdapter, planned: Planned, progress: Progress) -> Trained:
        train, plan = self._attempt.recipe.train, planned.memory
        optimizer = make_optimizer(adapter.vectors, train)
        scheduler = get_scheduler(
            train.schedule,
            optimizer,
            num_warmup_steps=train.warmup_steps,
            num_training_steps=planned.course.steps,
            scheduler_specific_kwargs=_SCHEDULE_ENDS.get(train.schedule),
        )
        progress.plan = {"engine": plan.path, **plan.cut, "device": device_name(self._setting.device)}
        return Trained(model=model.model, optimizer=optimizer, scheduler=scheduler, progress=progress)

    def _describe(self, model: PackedModel, trained: Trained, planned: Planned) -> TrainedRun:
        setting, evaluation = self._setting, self._attempt.recipe.evaluate
        rules = token_rules(setting.tokenizer, self._attempt.recipe.data)
        questions = questions_of_prompts(evaluation.prompts, setting.tokenizer, rules) + questions_of_documents(
            setting.dataset.validation, setting.tokenizer, most=evaluation.answers
        )
        counts = parameter_counts(model)
        return TrainedRun(
            progress=trained.progress,
            course=planned.course,
            memory_plan=planned.memory,
            engine_reason=planned.choice.reason,
            questions=questions,
            architecture=type(model.model.get_base_model()).__name__,
            trainable_parameters=counts[0],
            total_parameters=counts[1],
            resumed_from=None,
            passed_over=[],
        )

    def _resume(self, trained: Trained, run: TrainedRun) -> None:
        """Go on from the newest checkpoint that verifies; without one, from the seed."""
        torch.manual_seed(self._attempt.recipe.train.seed)
        planned = dict(trained.progress.plan)
        with self._attempt.phases.phase("resume"):
            newest, passed_over = self._setting.artifacts.fetch_newest(
                self._scratch, should_stop=self._attempt.should_stop, only=checkpoints.FILES
            )
            run.passed_over = [each | {"reason": self._attempt.hide(each["reason"])} for each in passed_over]
            if newest is None:
                return
            checkpoints.load(trained, self._scratch / newest.name)
            shutil.rmtree(self._scratch / newest.name)
        crash_point("resume.after")
        run.resumed_from = newest
        standing = self._attempt.standing
        standing.step = standing.from_step = standing.last_committed_step = newest.step
        trained.progress.plan = planned | trained.progress.plan  # an older image's plan may lack what is new in it
        before, now = _where(trained.progress.plan), _where(planned)
        if before not in {now, _where(planned | {"compiled": False})}:  # what is no longer compiled stays as it is
            trained.progress.plan = planned
            trained.progress.changes.append(
                f"resumed at step {newest.step} on {now} after {before}: equal within rounding, not to the bit"
                + (" (and dropout draws other masks)" if self._attempt.recipe.lora.dropout else "")
            )
        log.info("resumed", checkpoint=newest.name, step=newest.step, of=run.course.steps)

    def _ask_base(self, model: PackedModel, progress: Progress, run: TrainedRun) -> None:
        if progress.base_answers is not None:
            return
        with self._attempt.phases.phase("ask_base"), model.model.disable_adapter():
            progress.base_answers = self._ask(model, run.questions)

    def _ask(self, model: PackedModel, questions: Sequence[Question]) -> list[str]:
        recipe = self._attempt.recipe
        return answer(
            model,
            questions,
            self._setting.tokenizer,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            seed=recipe.train.seed,
            should_stop=self._attempt.moves_on,  # asked after each token
        )

    def _on_no_longer_compiled(self, progress: Progress, reason: str) -> None:
        """Kept with the run: an attempt that goes on from here does not compile again, which would round otherwise."""
        log.warning("layers_no_longer_compiled", reason=reason)
        progress.plan["compiled"] = False
        progress.changes.append(
            f"after step {progress.step} layers ran as they are, no longer compiled: {self._attempt.hide(reason)}"
        )

    def _hooks(
        self, model: PackedModel, trained: Trained, run: TrainedRun, publisher: Publisher, tracking: Tracking
    ) -> Hooks:
        teller = StepTeller(self._attempt, tracking)

        def on_step(record: StepRecord) -> None:
            run.step_seconds.append(record.seconds)
            self._attempt.limits.cost.add_step(record.seconds)
            self._notice_full_memory(run)
            teller.step(record)

        step_cut = trained.progress.plan["micro_batch_tokens"]

        def on_out_of_memory(plan: dict[str, Any]) -> None:
            nonlocal step_cut
            was, step_cut = step_cut, plan["micro_batch_tokens"]
            if self._attempt.recipe.lora.dropout and step_cut != was:
                trained.progress.changes.append(
                    f"memory ran out after step {trained.progress.step}: smaller micro-batches draw other dropout masks"
                )
            self._tell_out_of_memory(run)

        def is_commit_due(steps_since: int) -> bool:
            return self._attempt.limits.checkpoint_due(
                steps_since=steps_since,
                seconds_since=time.monotonic() - self._committed_at,
                every_steps=self._attempt.recipe.checkpoint.every_steps,
                uploads_under_way=publisher.under_way,
            )

        def on_micro_batch() -> None:
            self._attempt.phases.on_beat()
            before, self._looked_at = self._looked_at, time.monotonic()
            # The first kernels compile; on the GPU the host runs ahead, and only the largest gap is a micro-batch.
            if self._attempt.limits.cost.steps:
                self._longest_micro_batch = max(self._longest_micro_batch, self._looked_at - before)

        return Hooks(
            should_stop=self._attempt.should_stop,
            evaluate=lambda step, tokens: self._evaluate(model, step, tokens),
            on_first_step=partial(self._on_first_step, run),
            on_step=on_step,
            on_evaluation=teller.evaluation,
            on_checkpoint=partial(self._commit, trained, publisher),
            is_commit_due=is_commit_due,
            on_micro_batch=on_micro_batch,
            must_cut_step=partial(self._must_cut_step, publisher),
            on_out_of_memory=on_out_of_memory,
        )

    def _commit(self, trained: Trained, publisher: Publisher) -> None:
        """Save the state as it stands, and send it off."""
        checkpoint = Checkpoint(step=trained.progress.step, attempt=self._setting.attempt_number)
        folder = self._scratch / checkpoint.name
        began = time.monotonic()
        _save(trained, folder)
        crash_point("save.after")
        size = sum(path.stat().st_size for path in folder.iterdir())
        self._attempt.limits.cost.add_save(time.monotonic() - began, size)
        judged = trained.progress.evaluations
        publisher.submit(folder, checkpoint, candidates=judge(judged).candidate_steps if judged else ())
        self._committed_at = self._looked_at = time.monotonic()
        self._attempt.phases.on_beat()

    def _must_cut_step(self, publisher: Publisher) -> bool:
        """Whether a stop was asked for, and saving needs what time is left."""
        return self._attempt.should_stop() and self._attempt.limits.must_cut_step(
            time.monotonic(),
            self._attempt.standing.asked_at,
            uploads_under_way=publisher.under_way,
            next_look_seconds=self._longest_micro_batch,
        )

    def _notice_full_memory(self, run: TrainedRun) -> None:
        """While the first steps find their memory, it is asked for anew as a matter of course."""
        before, run.allocation_retries = run.allocation_retries, allocation_retries(self._setting.device)
        if run.allocation_retries > before and len(run.step_seconds) > _SETTLING_STEPS and not self._told_of_memory:
            self._told_of_memory = True
            reason = (
                "the GPU's memory is nearly full and in pieces: steps wait while it is given back and asked for anew. "
                "Another process may hold part of it; otherwise lower data.max_length"
            )
            log.warning("memory_in_pieces", retries=run.allocation_retries, reason=reason)
            self._attempt.notes.append(reason)

    def _tell_out_of_memory(self, run: TrainedRun) -> None:
        run.out_of_memory += 1
        log.warning("out_of_memory", then=dict(run.progress.plan))

    def _on_first_step(self, run: TrainedRun) -> None:
        spent = self._attempt.phases.so_far()
        spent["first_step"] = spent.pop("train")
        run.start_seconds = {name: round(seconds, 3) for name, seconds in spent.items()}
        log.info(
            "start",
            seconds=round(sum(run.start_seconds.values()), 3),
            base_from=loaded_from(self._setting.base),
            spent=run.start_seconds,
        )

    def _evaluate(self, model: PackedModel, step: int, tokens_at_once: int) -> Evaluation:
        validation = self._setting.dataset.validation

        def on_progress(done: int) -> None:
            self._attempt.phases.progress(evaluated=done, of=len(validation))
            crash_point("evaluate.middle")

        with self._attempt.phases.phase("evaluate"):
            result = evaluate(
                model,
                validation,
                step=step,
                tokens_at_once=tokens_at_once,
                should_stop=self._attempt.should_stop,
                on_progress=on_progress,
            )
        if not math.isfinite(result.loss):
            # Nothing can be chosen by it, and no later step would heal it.
            worst = [validation.where(i) for i in range(len(validation)) if not math.isfinite(result.nll[i])]
            advice = "Lower train.learning_rate" if step else "No step was made: choose another model.base"
            raise DivergedError(
                f"step {step}: the validation loss is {result.loss}. {advice}, or look at the held-out examples "
                f"{', '.join(worst[:8])} ({len(worst)} in all)"
            )
        return result

    def _on_committed(self, checkpoint: Checkpoint, seconds: float) -> None:
        attempt = self._attempt
        attempt.standing.last_committed_step = checkpoint.step
        attempt.phases.on_beat()
        log.info("checkpoint", step=checkpoint.step, name=checkpoint.name, upload_seconds=round(seconds, 3))
        attempt.limits.cost.add_upload(seconds)
        while self._earlier:
            shutil.rmtree(self._earlier.pop(), ignore_errors=True)
        warning = attempt.limits.warning()
        if warning is not None and not self._warned:
            self._warned = True
            log.warning("stop_does_not_fit", reason=warning)
            attempt.notes.append(warning)


def _where(plan: Mapping[str, Any]) -> str:
    """What makes numbers equal to the bit: the device, the path that computes the gradients, compiled code or not."""
    how = " on the fast path" if plan.get("engine") == "fast" else " with compiled layers" if plan["compiled"] else ""
    return f"{plan['device']}{how}"


def _save(trained: Trained, folder: Path) -> None:
    try:
        checkpoints.save(trained, folder)
    except SafetensorError as error:  # its word for what the disk refused
        raise LocalDiskError(
            f"{folder}: the checkpoint cannot be written ({error}); give the work folder more room, "
            "or name another one with --workdir"
        ) from error


def _facts(recipe: Any) -> dict[str, Any]:
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
