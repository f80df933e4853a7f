"""What is known of a finished run, as report.json holds it."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from job import __version__
from job.core.attempt.ended import WITHOUT_A_WORD
from job.core.data.report_data import DataReport
from job.core.judging.held_out import Answer, exact_match, held_out, loss_of_example, tried
from job.core.judging.verdict import NOTHING_BETTER, Verdict, is_exhausted
from job.core.plan.ceiling import flops_per_token, share_of_ceiling
from job.core.plan.gpus import gpu_called
from job.core.plan.memory import AdapterShape, ModelShape
from job.core.recipe.schema import Recipe
from job.core.reports.report import (
    OWN_NAME,
    AdapterFile,
    AdapterReport,
    AttemptReport,
    EvaluationReport,
    MachineReport,
    ModelReport,
    PlanReport,
    Report,
    SourceCurve,
    SourceShare,
    StartReport,
    SweetSpot,
    Throughput,
    TrainingCurve,
)
from job.edge.host.machine import processor_name, system_name
from job.edge.store.folder import FileEntry
from job.stages.attempt import Attempt
from job.stages.base.base_source import loaded_from
from job.stages.base.loading import Inputs
from job.stages.finishing.results import Results, Scores
from job.stages.loop import TrainingFacts
from job.tune.device.device import device_name, driver_version, peak_memory_bytes
from job.tune.model.config import read_config, shape_of
from job.tune.model.stored.mxfp4 import is_published_in_mxfp4

_NAMED_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "pyarrow", "boto3")


def assemble_report(
    attempt: Attempt,
    inputs: Inputs,
    facts: TrainingFacts,
    verdict: Verdict,
    *,
    files: Mapping[str, FileEntry],
    proven_loss: float,
    tuned: Sequence[str],
    results: Results,
) -> Report:
    """Everything that is known of the run, as report.json holds it.

    Args:
        attempt: this process.
        inputs: what training started from.
        facts: what training left.
        verdict: which checkpoint was chosen.
        files: of the published adapter.
        proven_loss: validation loss of the published adapter.
        tuned: the tuned model's answers, in the order of the run's questions.
        results: what came of each held-out example.
    """
    chosen, where = verdict.sweet_spot_step, inputs.dataset.validation.where
    answers = _answers(inputs, facts, tuned, results.scores, chosen=chosen)
    evaluations = facts.progress.evaluations
    return Report(
        run_id=inputs.artifacts.run_id,
        run_uri=inputs.artifacts.uri,
        fence=inputs.artifacts.fence,
        finished=_now(),
        recipe=attempt.worker.recipe.model_dump(mode="json"),
        data=_data(attempt.worker.recipe, inputs, facts),
        model=_model(inputs, facts),
        plan=_plan(inputs, facts),
        curve=_curve(inputs, facts),
        evaluations=_evaluations(inputs, facts),
        sweet_spot=_sweet_spot(attempt.worker.recipe, facts, verdict),
        exact_match=exact_match(answers),
        answers=tuple(answers),
        metric=results.metric,
        per_example=results.file,
        change=results.change,
        held_out=held_out(evaluations, chosen=chosen, where=where),
        tried=tried(evaluations, chosen=chosen, where=where),
        adapter=AdapterReport(
            uri=f"{inputs.artifacts.uri}/adapter",
            files={name: AdapterFile(size=f.size, sha256=f.sha256) for name, f in files.items()},
            proven_loss=proven_loss,
            reported_loss=evaluations[chosen].loss,
            refused_by=facts.refused_by,
        ),
        throughput=_throughput(attempt, inputs, facts),
        start=_start(facts),
        stop=attempt.limits.figures(),
        resume_exact=facts.resume_exact,
        notes=notes(attempt, facts),
        versions=_versions(),
        machine=MachineReport(system=system_name(), processor=processor_name(), driver=driver_version()),
        device=device_name(inputs.device),
        attempts=_attempts(inputs, facts),
    )


def notes(attempt: Attempt, facts: TrainingFacts) -> tuple[str, ...]:
    """What the report's reader should know, as far as it is known now."""
    return (*attempt.notes, *facts.progress.changes)


def _model(inputs: Inputs, facts: TrainingFacts) -> ModelReport:
    return ModelReport(
        base=inputs.base.identity.source,
        revision=inputs.base.identity.revision,
        licence=inputs.base.licence,
        architecture=facts.architecture,
        left_out=facts.left_out,
        quantisation=f"{facts.form}; {facts.progress.cut.compute_dtype} compute",
        in_mxfp4=is_published_in_mxfp4(read_config(inputs.base.folder)),
        loaded_from=loaded_from(inputs.base),
        trainable_parameters=facts.trainable_parameters,
        total_parameters=facts.total_parameters,
    )


def _plan(inputs: Inputs, facts: TrainingFacts) -> PlanReport:
    cut = facts.progress.cut
    return PlanReport(
        engine=cut.engine,
        engine_reason=facts.engine_reason,
        micro_batch_tokens=cut.micro_batch_tokens,
        checkpointing=cut.checkpointing,
        kept_layers=cut.kept_layers,
        recomputed_layers=cut.recomputed_layers,
        compiled=cut.compiled,
        document_rows=cut.rows,
        recompilations=facts.recompilations,
        compute_dtype=cut.compute_dtype,
        predicted_peak_bytes=facts.memory.predicted_peak_bytes,
        reason=facts.memory.reason,
        steps=facts.course.steps,
        epochs=facts.course.epochs,
        sources=source_shares(inputs, facts),
        out_of_memory=facts.out_of_memory,
        allocation_retries=facts.allocation_retries,
    )


def source_shares(inputs: Inputs, facts: TrainingFacts) -> tuple[SourceShare, ...]:
    """What is taken of each source, where there are several; as planned, also in a run that stopped early."""
    course, sources = facts.course, inputs.dataset.report.train.sources
    drawn = course.mixture.drawn(course.total)
    return tuple(
        SourceShare(
            name=source.name,
            examples=drawn[place],
            share=course.mixture.share(place),
            epochs=drawn[place] / source.used,
        )
        for place, source in enumerate(sources)
    )


def _curve(inputs: Inputs, facts: TrainingFacts) -> TrainingCurve:
    progress, sources = facts.progress, inputs.dataset.report.train.sources
    return TrainingCurve(
        loss=tuple(progress.losses),
        grad_norm=tuple(progress.grad_norms),
        learning_rate=tuple(progress.learning_rates),
        sources=tuple(
            SourceCurve(name=source.name, loss=tuple(each[place] for each in progress.source_losses))
            for place, source in enumerate(sources)
        ),
    )


def _evaluations(inputs: Inputs, facts: TrainingFacts) -> tuple[EvaluationReport, ...]:
    return tuple(
        EvaluationReport(
            step=step,
            loss=e.loss,
            perplexity=e.perplexity,
            token_accuracy=e.token_accuracy,
            tokens=int(e.tokens.sum()),
            sources=inputs.dataset.losses_by_source(e),
            slices=inputs.dataset.losses_by_slice(e),
        )
        for step, e in sorted(facts.progress.evaluations.items())
    )


def _throughput(attempt: Attempt, inputs: Inputs, facts: TrainingFacts) -> Throughput:
    progress = facts.progress
    rate = progress.tokens / progress.seconds if progress.seconds else 0.0
    return Throughput(
        tokens=progress.tokens,
        seconds=progress.seconds,
        tokens_per_second=rate,
        step_seconds_median=facts.step_seconds_median,
        ranks=progress.ranks,
        nodes=facts.nodes,
        placement=facts.placement,
        tokens_per_second_a_rank=rate / progress.ranks,
        **_ceiling(attempt.worker.recipe, inputs, facts),
        waited_seconds=round(facts.waited_seconds, 3),
        bytes_a_step=facts.bytes_sent // max(1, len(facts.step_seconds)),
        peak_memory_bytes=peak_memory_bytes(inputs.device),
        phase_seconds={name: round(seconds, 3) for name, seconds in attempt.phases.seconds.items()},
    )


def _ceiling(recipe: Recipe, inputs: Inputs, facts: TrainingFacts) -> dict[str, Any]:
    """What of its GPU this attempt used; empty: it made no step, or the GPU's pace is not known."""
    gpu, seconds = gpu_called(device_name(inputs.device)), sum(facts.step_seconds)
    if gpu is None or gpu.speed is None or not seconds:
        return {}
    train, drawn = inputs.dataset.train, facts.course.drawn()
    flops = flops_per_token(
        *_trained_on(recipe, inputs, facts), lengths=train.lengths[drawn], targets=int(train.targets[drawn].sum())
    )
    rate = facts.tokens / seconds / facts.progress.ranks
    return {
        "ceiling_share": share_of_ceiling(gpu.speed, tokens_per_second=rate, flops=flops),
        "ceiling_tflops": gpu.speed.sustained_flops / 1e12,
        "ceiling_from": gpu.speed.source,
    }


def _trained_on(recipe: Recipe, inputs: Inputs, facts: TrainingFacts) -> tuple[ModelShape, AdapterShape]:
    adapter = AdapterShape(
        parameters=facts.trainable_parameters,
        rank=recipe.lora.r,
        optimizer=recipe.train.optimizer,
        on_experts=recipe.lora.on_experts,
    )
    return shape_of(read_config(inputs.base.folder)), adapter


def _data(recipe: Recipe, inputs: Inputs, facts: TrainingFacts) -> DataReport:
    """With what training at each max_length would take of the GPU."""
    report, encoded = inputs.dataset.report, inputs.dataset.train.encoded
    if report.train.dropped:
        return report
    shapes, lengths = _trained_on(recipe, inputs, facts), encoded.lengths

    def operations(limit: int) -> float:
        cut = np.minimum(lengths, limit)
        targets = int(encoded.target_counts(limit).sum())
        return flops_per_token(*shapes, lengths=cut, targets=targets) * float(cut.sum())

    now = operations(report.max_length)
    found = [each.model_copy(update={"work": operations(each.tokens) / now}) for each in report.candidates]
    return report.model_copy(update={"candidates": tuple(found)})


def _start(facts: TrainingFacts) -> StartReport | None:
    if facts.start_seconds is None:
        return None
    return StartReport(seconds=round(sum(facts.start_seconds.values()), 3), spent=facts.start_seconds)


def _sweet_spot(recipe: Recipe, facts: TrainingFacts, verdict: Verdict) -> SweetSpot:
    evaluations = facts.progress.evaluations
    chosen, best = evaluations[verdict.sweet_spot_step], evaluations[verdict.best_step]
    reason = "lowest validation loss"
    if chosen.step != best.step:
        reason = f"earliest not significantly worse than the best, step {best.step} with {best.loss:.4f}"
    if chosen.step == 0:
        reason = f"{NOTHING_BETTER}: {reason}"
    patience = recipe.evaluate.patience
    return SweetSpot(
        step=chosen.step,
        loss=chosen.loss,
        best_step=best.step,
        best_loss=best.loss,
        base_loss=evaluations[0].loss,
        reason=reason,
        overfitting_from_step=verdict.overfitting_from_step,
        stopped_early=facts.progress.step < facts.course.steps and is_exhausted(evaluations, patience=patience),
    )


def _answers(
    inputs: Inputs, facts: TrainingFacts, tuned: Sequence[str], scores: Scores, *, chosen: int
) -> list[Answer]:
    references = inputs.dataset.judging.references
    answers, evaluations, where = [], facts.progress.evaluations, inputs.dataset.validation.where
    for q, b, t in zip(facts.questions, facts.progress.base_answers or [], tuned, strict=True):
        answer = Answer(prompt=q.prompt, expected=q.expected, base=b, tuned=t)
        if q.document is not None:
            losses = [loss_of_example(evaluations[step], q.document) for step in (0, chosen)]
            reference = references.get(q.document)
            found = {
                "where": where(q.document),
                "base_loss": losses[0],
                "tuned_loss": losses[1],
                "reference": None if reference == q.expected else reference,
                "base_score": scores.base[q.document],
                "tuned_score": scores.tuned[q.document],
            }
            answer = answer.model_copy(update=found)
        answers.append(answer)
    return answers


def _attempts(inputs: Inputs, facts: TrainingFacts) -> tuple[AttemptReport, ...]:
    reports = []
    for known in inputs.artifacts.attempts():
        mine = known["number"] == inputs.attempt_number
        end: dict[str, Any] = known["end"] or {}
        if mine:
            end = {
                "ended": _now(),
                "exit_code": 0,
                "reason": "finished",
                "from_step": facts.resumed.checkpoint.step if facts.resumed.checkpoint else 0,
                "last_committed_step": facts.progress.step,
            }
        device, passed_over = (device_name(inputs.device), facts.resumed.passed_over) if mine else (None, ())
        reports.append(attempt_report(known, end, device=device, passed_over=passed_over))
    return tuple(reports)


def attempt_report(
    known: Mapping[str, Any],
    end: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    passed_over: tuple[dict[str, str], ...] = (),
) -> AttemptReport:
    """One attempt as its records have it.

    Args:
        known: its record.
        end: how it ended; None: as its record says.
        device: its own; None: as its end's record says.
        passed_over: checkpoints that did not verify.
    """
    ended = (known["end"] or {}) if end is None else end
    return AttemptReport(
        number=known["number"],
        started=known.get("started") or "",
        ended=ended.get("ended"),
        host=known.get("host") or "",
        device=device or ended.get("device"),
        exit_code=ended.get("exit_code"),
        reason=ended.get("reason") or WITHOUT_A_WORD,
        from_step=ended.get("from_step"),
        last_committed_step=ended.get("last_committed_step"),
        passed_over=passed_over,
        ranks=known.get("ranks"),
        lasted_at_least=ended.get("lasted_at_least"),
    )


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _NAMED_VERSIONS}
    own = {OWN_NAME: __version__, "python": platform.python_version()}
    return {**own, **versions, "cuda": torch.version.cuda or "none"}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
