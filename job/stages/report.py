"""What is told of a finished run: the report, and the card that goes with the adapter."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from job.core.recipe import is_hub_id
from job.core.report import (
    AdapterFile,
    AdapterReport,
    Answer,
    AttemptReport,
    EvaluationReport,
    ExactMatch,
    ModelReport,
    PlanReport,
    Report,
    StartReport,
    SweetSpot,
    Throughput,
    TrainingCurve,
)
from job.core.verdict import Verdict, is_exhausted
from job.edge.store.folder import FileEntry
from job.stages.attempt import Attempt
from job.stages.base_source import loaded_from
from job.stages.training import Setting, TrainedRun
from job.tune.device.device import device_name, peak_memory_bytes

_NAMED_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy", "boto3")


def assemble_report(
    attempt: Attempt,
    setting: Setting,
    run: TrainedRun,
    verdict: Verdict,
    *,
    files: Mapping[str, FileEntry],
    proven_loss: float,
    tuned: Sequence[str],
) -> Report:
    """Everything that is known of the run, as report.json holds it.

    Args:
        attempt: this process.
        setting: what training started from.
        run: what training left.
        verdict: which checkpoint was chosen.
        files: of the published adapter.
        proven_loss: validation loss of the published adapter.
        tuned: the tuned model's answers, in the order of the run's questions.
    """
    answers = _answers(run, tuned)
    return Report(
        run_id=setting.artifacts.run_id,
        run_uri=setting.artifacts.uri,
        fence=setting.artifacts.fence,
        finished=_now(),
        recipe=attempt.recipe.model_dump(mode="json"),
        data=setting.dataset.report,
        model=_model(setting, run),
        plan=_plan(run),
        curve=_curve(run),
        evaluations=_evaluations(run),
        sweet_spot=_sweet_spot(attempt, run, verdict),
        exact_match=_exact_match(answers),
        answers=tuple(answers),
        adapter=AdapterReport(
            uri=f"{setting.artifacts.uri}/adapter",
            files={name: AdapterFile(size=f.size, sha256=f.sha256) for name, f in files.items()},
            proven_loss=proven_loss,
            reported_loss=run.progress.evaluations[verdict.sweet_spot_step].loss,
        ),
        throughput=_throughput(attempt, setting, run),
        start=_start(run),
        stop=attempt.limits.figures(),
        resume_exact=run.resume_exact,
        notes=(*attempt.notes, *run.progress.changes),
        versions=_versions(),
        device=device_name(setting.device),
        attempts=_attempts(setting, run),
    )


def _model(setting: Setting, run: TrainedRun) -> ModelReport:
    return ModelReport(
        base=setting.base.identity.source,
        revision=setting.base.identity.revision,
        licence=setting.base.licence,
        architecture=run.architecture,
        quantisation="NF4, double quantisation, bf16 compute",
        loaded_from=loaded_from(setting.base),
        trainable_parameters=run.trainable_parameters,
        total_parameters=run.total_parameters,
    )


def _plan(run: TrainedRun) -> PlanReport:
    plan = run.progress.plan
    return PlanReport(
        engine=plan["engine"],
        engine_reason=run.engine_reason,
        micro_batch_tokens=plan["micro_batch_tokens"],
        checkpointing=plan["checkpointing"],
        kept_layers=plan["kept_layers"],
        recomputed_layers=plan["recomputed_layers"],
        compiled=plan["compiled"],
        predicted_peak_bytes=run.memory_plan.predicted_peak_bytes,
        reason=run.memory_plan.reason,
        steps=run.course.steps,
        epochs=run.course.epochs,
        out_of_memory=run.out_of_memory,
        allocation_retries=run.allocation_retries,
    )


def _curve(run: TrainedRun) -> TrainingCurve:
    progress = run.progress
    return TrainingCurve(
        loss=tuple(progress.losses),
        grad_norm=tuple(progress.grad_norms),
        learning_rate=tuple(progress.learning_rates),
    )


def _evaluations(run: TrainedRun) -> tuple[EvaluationReport, ...]:
    return tuple(
        EvaluationReport(
            step=step,
            loss=e.loss,
            perplexity=e.perplexity,
            token_accuracy=e.token_accuracy,
            tokens=int(e.tokens.sum()),
        )
        for step, e in sorted(run.progress.evaluations.items())
    )


def _throughput(attempt: Attempt, setting: Setting, run: TrainedRun) -> Throughput:
    progress = run.progress
    return Throughput(
        tokens=progress.tokens,
        seconds=progress.seconds,
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
        step_seconds_median=run.step_seconds_median,
        peak_memory_bytes=peak_memory_bytes(setting.device),
        phase_seconds={name: round(seconds, 3) for name, seconds in attempt.phases.seconds.items()},
    )


def _start(run: TrainedRun) -> StartReport | None:
    if run.start_seconds is None:
        return None
    return StartReport(seconds=round(sum(run.start_seconds.values()), 3), spent=run.start_seconds)


def _sweet_spot(attempt: Attempt, run: TrainedRun, verdict: Verdict) -> SweetSpot:
    evaluations = run.progress.evaluations
    chosen, best = evaluations[verdict.sweet_spot_step], evaluations[verdict.best_step]
    reason = "lowest validation loss"
    if chosen.step != best.step:
        reason = f"earliest not significantly worse than the best, step {best.step} with {best.loss:.4f}"
    patience = attempt.recipe.evaluate.patience
    return SweetSpot(
        step=chosen.step,
        loss=chosen.loss,
        best_step=best.step,
        best_loss=best.loss,
        base_loss=evaluations[0].loss,
        reason=reason,
        overfitting_from_step=verdict.overfitting_from_step,
        stopped_early=run.progress.step < run.course.steps and is_exhausted(evaluations, patience=patience),
    )


def _answers(run: TrainedRun, tuned: Sequence[str]) -> list[Answer]:
    base = run.progress.base_answers or []
    return [
        Answer(prompt=q.prompt, expected=q.expected, base=b, tuned=t)
        for q, b, t in zip(run.questions, base, tuned, strict=True)
    ]


def _exact_match(answers: Sequence[Answer]) -> ExactMatch | None:
    asked = [a for a in answers if a.expected is not None]
    if not asked:
        return None
    return ExactMatch(
        examples=len(asked),
        base=sum(a.base == a.expected for a in asked) / len(asked),
        tuned=sum(a.tuned == a.expected for a in asked) / len(asked),
    )


def _attempts(setting: Setting, run: TrainedRun) -> tuple[AttemptReport, ...]:
    reports = []
    for facts in setting.artifacts.attempts():
        mine = facts["number"] == setting.attempt_number
        end: dict[str, Any] = facts["end"] or {}
        if mine:
            end = {
                "ended": _now(),
                "exit_code": 0,
                "reason": "finished",
                "from_step": run.resumed_from.step if run.resumed_from else 0,
                "last_committed_step": run.progress.step,
            }
        reports.append(
            AttemptReport(
                number=facts["number"],
                started=facts["started"],
                ended=end.get("ended"),
                host=facts["host"],
                device=device_name(setting.device) if mine else end.get("device"),
                exit_code=end.get("exit_code"),
                reason=end.get("reason", "ended without a word: killed, or its node was lost"),
                from_step=end.get("from_step"),
                last_committed_step=end.get("last_committed_step"),
                passed_over=tuple(run.passed_over) if mine else (),
            )
        )
    return tuple(reports)


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _NAMED_VERSIONS}
    return {"python": platform.python_version(), **versions, "cuda": torch.version.cuda or "none"}


def adapter_card(attempt: Attempt, setting: Setting, verdict: Verdict, run: TrainedRun) -> str:
    """README.md of the adapter, with the front matter that model hubs read."""
    identity, data = setting.base.identity, setting.dataset.report
    evaluations = run.progress.evaluations
    hashes = "\n".join(f"- `{o.uri}` sha256 `{o.sha256}`" for o in (*data.train.objects, *data.validation.objects))
    licence = setting.base.licence or "not known; look at the base model"
    on_hub = is_hub_id(identity.source)
    loaded = identity.source if on_hub else "path/to/base"
    revision = f', revision="{identity.revision}"' if on_hub else ""
    return f"""---
base_model: {identity.source}
library_name: peft
tags: [lora, qlora]
---
# LoRA adapter for {identity.source}

Run `{setting.artifacts.run_id}`, step {verdict.sweet_spot_step} of {run.course.steps}: validation loss
{evaluations[0].loss:.4f} (base) -> {evaluations[verdict.sweet_spot_step].loss:.4f}.

- Base: `{identity.source}`, revision `{identity.revision}`
- Licence of the base: {licence}. It holds for what is made from the base too.
- Base read in 4 bits (NF4, double quantisation); LoRA r {attempt.recipe.lora.r}, alpha {attempt.recipe.lora.alpha:g}

Trained on {data.train.used} examples, judged on {data.validation.used}:
{hashes}

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
base = AutoModelForCausalLM.from_pretrained("{loaded}", dtype=torch.bfloat16, quantization_config=nf4{revision})
model = PeftModel.from_pretrained(base, "path/to/this/adapter")
# On some CPUs bitsandbytes refuses sizes that it can compute with; without this they end in an assertion:
# for module in base.modules(): module.support_avx512bf16_for_cpu = False
```
"""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
