"""After training: choose the checkpoint, publish its adapter, prove it, ask it, and commit the report."""

import gc
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog
import torch
from peft import PeftModel

from job.core.crash_points import crash_point
from job.core.errors import DataError, NotFoundError, RunConflictError, SickDeviceError
from job.core.report import Report
from job.core.verdict import Verdict, judge
from job.edge.run.checkpoints import Checkpoint
from job.edge.store.folder import FileEntry
from job.render.pictures import draw
from job.stages.attempt import Attempt
from job.stages.report import adapter_card, assemble_report
from job.stages.training import Setting, TrainedRun
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.checkpoint import ADAPTER_FILES
from job.tune.loop.evaluate import answer, evaluate
from job.tune.model.base import load_base

log = structlog.get_logger(__name__)

_SAME_LOSS = 1e-6
"""Relative difference that the proof accepts: the same kernels on the same numbers."""
_NEAR_LOSS = 1e-2
"""The same with other micro-batches or on another device, where bf16 rounds elsewhere."""


def finish(attempt: Attempt, setting: Setting, run: TrainedRun) -> Report:
    """Carry a trained run to its committed report.

    Raises:
        SickDeviceError: the adapter in the store does not give the loss that was measured in training.
        RunConflictError: no checkpoint that could be chosen is left in the store.
    """
    folder = attempt.workdir / "runs" / setting.artifacts.run_id
    with attempt.phases.phase("publish"):
        chosen, verdict = _fetch_chosen(attempt, setting, folder / "adapter", run)
        (folder / "adapter" / "README.md").write_text(adapter_card(attempt, setting, verdict, run), encoding="utf-8")
        files = setting.artifacts.publish_adapter(folder / "adapter")
    crash_point("prove.before")
    with attempt.phases.phase("prove"):
        model = _load_published(attempt, setting, folder / "published", files)
        proven = evaluate(
            model,
            setting.dataset.validation,
            step=chosen.step,
            tokens_at_once=run.progress.plan["evaluation_tokens"],
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
            should_stop=attempt.moves_on,  # asked after each token
        )
    report = assemble_report(attempt, setting, run, verdict, files=files, proven_loss=proven, tuned=tuned)
    with attempt.phases.phase("report"):
        crash_point("pictures.before")
        for name, picture in draw(report).items():
            setting.artifacts.publish(name, picture)
        setting.artifacts.publish_report(report.model_dump_json(indent=2).encode() + b"\n")
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _fetch_chosen(attempt: Attempt, setting: Setting, folder: Path, run: TrainedRun) -> tuple[Checkpoint, Verdict]:
    """The verdict, and its adapter in the folder; a checkpoint that is damaged is passed over like one that is gone."""
    whole = setting.artifacts.checkpoints()
    verdict = _choose(attempt, setting, run, whole)
    while True:
        chosen = next(c for c in reversed(whole) if c.step == verdict.sweet_spot_step)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            setting.artifacts.fetch_checkpoint(chosen, folder, should_stop=attempt.should_stop, only=ADAPTER_FILES)
        except (DataError, NotFoundError) as error:
            log.warning("checkpoint_passed_over", checkpoint=chosen.name, reason=str(error))
            attempt.notes.append(f"{chosen.name} would have been chosen, but is damaged: {attempt.hide(str(error))}")
            whole.remove(chosen)
            verdict = _choose_among(setting, run, whole)
        else:
            return chosen, verdict


def _choose(attempt: Attempt, setting: Setting, run: TrainedRun, stored: Sequence[Checkpoint]) -> Verdict:
    """The verdict over the checkpoints that still stand in the store."""
    wanted, verdict = judge(run.progress.evaluations), _choose_among(setting, run, stored)
    if verdict.sweet_spot_step != wanted.sweet_spot_step:
        attempt.notes.append(
            f"step {wanted.sweet_spot_step} would have been chosen, but was significantly worse than the best of its "
            "time and so was not kept; with more held-out examples this does not happen"
        )
    return verdict


def _choose_among(setting: Setting, run: TrainedRun, stored: Sequence[Checkpoint]) -> Verdict:
    try:
        return judge(run.progress.evaluations, kept={checkpoint.step for checkpoint in stored})
    except ValueError as error:
        candidates = judge(run.progress.evaluations).candidate_steps
        raise RunConflictError(
            f"{setting.artifacts.uri}: none of the checkpoints worth keeping ({list(candidates)}) is whole in the "
            "store; were they deleted or changed by hand? Start again with another --run-id"
        ) from error


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
    shrunk = run.progress.plan["evaluation_tokens"] != run.memory_plan.evaluation_tokens
    if (shrunk or not run.resume_exact) and abs(proven - reported) <= _NEAR_LOSS * abs(reported):
        where = "with smaller passes" if shrunk else "on this device"
        attempt.notes.append(f"the adapter gives a validation loss of {proven:.6f} {where}, {reported:.6f} in training")
        return
    raise SickDeviceError(
        f"the adapter as downloaded again gives a validation loss of {proven:.6f}, but {reported:.6f} was measured in "
        "training: the store or the memory of this machine changed it; start the same job again"
    )
