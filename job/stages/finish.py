"""After training: choose the checkpoint, publish its adapter, prove it, ask it, and commit the report."""

import gc
import importlib.metadata
import platform
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
import torch
from peft import PeftModel

from job.core.errors import DataError
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
    SweetSpot,
    Throughput,
    TrainingCurve,
)
from job.core.verdict import Verdict, is_exhausted, judge
from job.edge.artifacts import Checkpoint, FileEntry
from job.edge.plots import draw
from job.stages.attempt import Attempt
from job.stages.training import Setting, TrainedRun
from job.tune.checkpoint import ADAPTER_FILES
from job.tune.device import device_name, peak_memory_bytes
from job.tune.evaluate import answer, evaluate
from job.tune.model import PackedModel, load_base

log = structlog.get_logger(__name__)

_SAME_LOSS = 1e-6
"""Relative difference that the proof accepts: the same kernels on the same numbers."""
_NAMED_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy", "boto3")


def finish(attempt: Attempt, setting: Setting, run: TrainedRun) -> Report:
    """Carry a trained run to its committed report.

    Raises:
        DataError: the adapter in the store does not give the loss that was measured in training.
    """
    verdict = judge(run.progress.evaluations)
    folder = attempt.workdir / "runs" / setting.artifacts.run_id
    with attempt.phases.phase("publish"):
        chosen = _chosen_checkpoint(setting, verdict)
        files = _publish_adapter(attempt, setting, folder / "adapter", chosen, verdict, run)
    with attempt.phases.phase("prove"):
        model = _load_published(attempt, setting, folder / "published", files)
        proven = evaluate(
            model,
            setting.dataset.validation,
            step=chosen.step,
            micro_batch_tokens=run.progress.plan["micro_batch_tokens"],
            should_stop=attempt.should_stop,
            on_progress=lambda done: attempt.phases.progress(evaluated=done),
        ).loss
        reported = run.progress.evaluations[chosen.step].loss
        if abs(proven - reported) > _SAME_LOSS * abs(reported):
            _explain_difference(attempt, run, proven, reported)
    with attempt.phases.phase("ask_tuned"):
        tuned = answer(
            model,
            run.questions,
            setting.tokenizer,
            max_new_tokens=attempt.recipe.evaluate.max_new_tokens,
            seed=attempt.recipe.train.seed,
            should_stop=attempt.should_stop,
        )
    report = _report(attempt, setting, run, verdict, files, proven=proven, tuned=tuned)
    with attempt.phases.phase("report"):
        for name, picture in draw(report).items():
            setting.artifacts.publish(name, picture)
        setting.artifacts.publish_report(report.model_dump_json(indent=2).encode() + b"\n")
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _chosen_checkpoint(setting: Setting, verdict: Verdict) -> Checkpoint:
    of_step = [c for c in setting.artifacts.checkpoints() if c.step == verdict.sweet_spot_step]
    if not of_step:
        raise DataError(
            f"{setting.artifacts.uri}: the checkpoint of step {verdict.sweet_spot_step} is gone from the store, "
            "although it is the one to keep; was it deleted by hand? Start again with another --run-id"
        )
    return of_step[-1]


def _publish_adapter(
    attempt: Attempt, setting: Setting, folder: Path, chosen: Checkpoint, verdict: Verdict, run: TrainedRun
) -> dict[str, FileEntry]:
    shutil.rmtree(folder, ignore_errors=True)
    setting.artifacts.fetch_checkpoint(chosen, folder, should_stop=attempt.should_stop, only=ADAPTER_FILES)
    (folder / "README.md").write_text(_adapter_card(attempt, setting, verdict, run), encoding="utf-8")
    return setting.artifacts.publish_adapter(folder)


def _load_published(attempt: Attempt, setting: Setting, folder: Path, files: Mapping[str, FileEntry]) -> PackedModel:
    """The adapter as anybody would get it: from the store, by PEFT, on a fresh 4-bit base."""
    shutil.rmtree(folder, ignore_errors=True)
    setting.artifacts.fetch_adapter(folder, files, should_stop=attempt.should_stop)
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    base = load_base(setting.base.folder, device=setting.device)
    return PackedModel(PeftModel.from_pretrained(base, folder)).eval()


def _explain_difference(attempt: Attempt, run: TrainedRun, proven: float, reported: float) -> None:
    if not run.resume_exact:
        attempt.notes.append(
            f"the adapter gives a validation loss of {proven:.6f} here; {reported:.6f} was measured on another device"
        )
        return
    raise DataError(
        f"the adapter as downloaded again gives a validation loss of {proven:.6f}, but {reported:.6f} was measured in "
        "training: the store or the memory of this machine changed it; start the same job again"
    )


def _report(
    attempt: Attempt,
    setting: Setting,
    run: TrainedRun,
    verdict: Verdict,
    files: Mapping[str, FileEntry],
    *,
    proven: float,
    tuned: Sequence[str],
) -> Report:
    progress, recipe = run.progress, attempt.recipe
    answers = _answers(run, tuned)
    return Report(
        run_id=setting.artifacts.run_id,
        run_uri=setting.artifacts.uri,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=recipe.model_dump(mode="json"),
        data=setting.dataset.report,
        model=ModelReport(
            base=setting.base.identity.source,
            revision=setting.base.identity.revision,
            licence=setting.base.licence,
            architecture=run.architecture,
            quantisation="NF4, double quantisation, bf16 compute",
            trainable_parameters=run.trainable_parameters,
            total_parameters=run.total_parameters,
        ),
        plan=PlanReport(
            micro_batch_tokens=progress.plan["micro_batch_tokens"],
            checkpointing=progress.plan["checkpointing"],
            reason=run.memory_plan.reason,
            steps=run.course.steps,
            epochs=run.course.epochs,
            out_of_memory=run.out_of_memory,
        ),
        curve=TrainingCurve(
            loss=tuple(progress.losses),
            grad_norm=tuple(progress.grad_norms),
            learning_rate=tuple(progress.learning_rates),
        ),
        evaluations=tuple(
            EvaluationReport(
                step=e.step,
                loss=e.loss,
                perplexity=e.perplexity,
                token_accuracy=e.token_accuracy,
                tokens=int(e.tokens.sum()),
            )
            for e in (progress.evaluations[step] for step in sorted(progress.evaluations))
        ),
        sweet_spot=_sweet_spot(attempt, run, verdict),
        exact_match=_exact_match(answers),
        answers=tuple(answers),
        adapter=AdapterReport(
            uri=f"{setting.artifacts.uri}/adapter",
            files={name: AdapterFile(size=f.size, sha256=f.sha256) for name, f in files.items()},
            proven_loss=proven,
            reported_loss=progress.evaluations[verdict.sweet_spot_step].loss,
        ),
        throughput=Throughput(
            tokens=progress.tokens,
            seconds=progress.seconds,
            tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
            step_seconds_median=run.step_seconds_median,
            peak_memory_bytes=peak_memory_bytes(setting.device),
            phase_seconds={name: round(seconds, 3) for name, seconds in attempt.phases.seconds.items()},
        ),
        resume_exact=run.resume_exact,
        notes=tuple(attempt.notes),
        versions=_versions(),
        device=device_name(setting.device),
        attempts=_attempts(setting, run),
    )


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
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
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


def _adapter_card(attempt: Attempt, setting: Setting, verdict: Verdict, run: TrainedRun) -> str:
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
```
"""
