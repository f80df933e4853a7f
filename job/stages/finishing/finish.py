"""After training: choose the checkpoint, publish its adapter, prove it, ask it, and commit the report."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import structlog

from job.core.crash_points import crash_point
from job.core.errors import DataError, NotFoundError, RunConflictError
from job.core.judging.verdict import NOTHING_BETTER, Verdict, judge
from job.core.nightly.promotion_report import CarriedOut, ended_with
from job.core.recipe.data_section import DataSection
from job.core.reports.report import AdapterFile, Report
from job.edge.run.checkpoints import Checkpoint
from job.render.cards.adapter import adapter_card
from job.render.page.finished import report_html
from job.render.page.writing import REPORT_HTML
from job.render.pictures import draw
from job.stages.attempt import Attempt
from job.stages.base.loading import Inputs
from job.stages.finishing.proving import let_go, load_published, prove
from job.stages.finishing.report import assemble_report, notes
from job.stages.finishing.results import results_of
from job.stages.loop import TrainingFacts
from job.stages.nightly.night import Night
from job.stages.nightly.promotion import Published, examine, judged_files, promote
from job.stages.tracking import Tracked
from job.tune.loop.checkpoint import ADAPTER_FILES
from job.tune.loop.evaluate import answer
from job.tune.model.serving import write_serving_files
from job.tune.world import ALONE, World

log = structlog.get_logger(__name__)
_CARD = "README.md"


def finish(
    attempt: Attempt,
    inputs: Inputs,
    facts: TrainingFacts,
    tracked: Tracked,
    night: Night | None = None,
    world: World = ALONE,
) -> Report:
    """Carry a trained run to its committed report; on a channel it is judged before, and may be put in use.

    Args:
        attempt: this process.
        inputs: the base and the run.
        facts: of the training.
        tracked: the run in its trackers.
        night: what is known of the channel; None: the recipe names none.
        world: the others, whom a base that is sharded needs for the proof too.

    Raises:
        SickDeviceError: the adapter in the store does not give the loss that was measured in training.
        RunConflictError: no checkpoint that could be chosen is left in the store.
    """
    recipe, phases, artifacts = attempt.worker.recipe, attempt.phases, inputs.artifacts
    folder = attempt.worker.run_folder(artifacts.run_id)
    with phases.phase("publish"):
        chosen, verdict = _fetch_chosen(attempt, inputs, folder / "adapter", facts)
        if chosen.step == 0:
            attempt.notes.append(_nothing_better(inputs, facts))
        # With a verdict on it, it may be in use: what an attempt before has published then stands, to the byte.
        files = None if night is None else judged_files(night, artifacts)
        if files is None:
            _write_serving_files(inputs, recipe.data, folder / "adapter")
            files = artifacts.publish_adapter(folder / "adapter")
    crash_point("prove.before")
    with phases.phase("prove"):
        model = load_published(
            attempt,
            inputs,
            folder / "published",
            files,
            left_to_peft=facts.left_to_peft,
            rows=facts.rows,
            world=world,
        )
        proven = prove(attempt, inputs, facts, model, step=chosen.step)
    with phases.phase("ask_tuned"):
        tuned = answer(
            model,
            facts.questions,
            inputs.tokenizer,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            seed=recipe.train.seed,
            should_stop=attempt.moves_on,  # asked after each token
        )
    published = Published(files=files, proven=proven, answers=tuned)
    examined = None if night is None else examine(attempt, inputs, facts, night, model, published, world)
    let_go(model, world)
    del model  # others come in its place
    with phases.phase("sum_up"):
        results = results_of(attempt, inputs, facts, tuned, step=chosen.step)
        report = assemble_report(
            attempt, inputs, facts, verdict, files=files, proven_loss=proven.loss, tuned=tuned, results=results
        )
    if night is not None and examined is not None:
        promotion, answers = promote(attempt, inputs, night, examined, trained=report)
        report = report.model_copy(update={"promotion": promotion, "answers": answers})
        done = CarriedOut(judged=promotion.judged, outcome=promotion.outcome, replaced_by=promotion.replaced_by)
        attempt.standing.promotion = ended_with(done, channel=promotion.channel, also=promotion.also)
    with phases.phase("report"):
        report = _commit(attempt, inputs, facts, tracked, _with_card(attempt, inputs, report, folder / _CARD))
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _commit(attempt: Attempt, inputs: Inputs, facts: TrainingFacts, tracked: Tracked, report: Report) -> Report:
    """Pictures, trackers and page first, then the report: with it the run is done."""
    artifacts = inputs.artifacts
    crash_point("pictures.before")
    for name, picture in draw(report).items():
        with attempt.not_at_the_cost_of_the_run(name):
            artifacts.publish(name, picture)
    tracked.conclude(report)
    report = report.model_copy(update={"notes": notes(attempt, facts)})  # with what was not written just now
    with attempt.not_at_the_cost_of_the_run(REPORT_HTML):
        artifacts.publish(REPORT_HTML, report_html(report))
    report = report.model_copy(update={"notes": notes(attempt, facts)})
    artifacts.publish_report(report.model_dump_json(indent=2).encode() + b"\n")
    return report


def _write_serving_files(inputs: Inputs, data: DataSection, folder: Path) -> None:
    ends = inputs.dataset.train.ends()
    write_serving_files(folder, inputs.base.folder, inputs.tokenizer, data, ends=ends)


def _nothing_better(inputs: Inputs, facts: TrainingFacts) -> str:
    later = len(facts.progress.evaluations) - 1
    parent = inputs.parent
    found = NOTHING_BETTER if parent is None else f"nothing better than {parent.run_id}, the start, was found"
    left = "the base as it is" if parent is None else "what it started from as it was"
    return (
        f"{found}: none of {later} later evaluations has a significantly lower validation loss than step 0, "
        f"so the adapter leaves {left}; look at the data and at train.learning_rate, or train longer"
    )


def _with_card(attempt: Attempt, inputs: Inputs, report: Report, path: Path) -> Report:
    """The report, which names the adapter's README too once that is written: it is for people alone."""
    path.write_text(adapter_card(report), encoding="utf-8")
    files = dict(report.adapter.files)
    with attempt.not_at_the_cost_of_the_run(f"adapter/{_CARD}"):
        entry = inputs.artifacts.add_to_adapter(path)
        files[_CARD] = AdapterFile(size=entry.size, sha256=entry.sha256)
    return report.model_copy(update={"adapter": report.adapter.model_copy(update={"files": files})})


def _fetch_chosen(attempt: Attempt, inputs: Inputs, folder: Path, facts: TrainingFacts) -> tuple[Checkpoint, Verdict]:
    """The verdict, and its adapter, written anew into the folder.

    A checkpoint that is damaged is passed over like one that is gone.
    """
    whole = inputs.artifacts.checkpoints()
    verdict = _choose(attempt, inputs, facts, whole)
    while True:
        chosen = next(c for c in reversed(whole) if c.step == verdict.sweet_spot_step)
        arrived = folder.with_name("chosen")
        for old in (folder, arrived):
            shutil.rmtree(old, ignore_errors=True)
        try:
            inputs.artifacts.fetch_checkpoint(
                chosen, arrived, should_stop=attempt.worker.should_stop, only=ADAPTER_FILES[:1]
            )
            facts.adapter.write(arrived / ADAPTER_FILES[0], folder)  # ours: nothing of a bucket is published as it is
        except (DataError, NotFoundError) as error:
            log.warning("checkpoint_passed_over", checkpoint=chosen.name, reason=str(error))
            attempt.notes.append(f"{chosen.name} would have been chosen, but is damaged: {attempt.hide(str(error))}")
            whole.remove(chosen)
            verdict = _choose_among(inputs, facts, whole)
        else:
            return chosen, verdict


def _choose(attempt: Attempt, inputs: Inputs, facts: TrainingFacts, stored: Sequence[Checkpoint]) -> Verdict:
    """The verdict over the checkpoints that still stand in the store."""
    wanted, verdict = judge(facts.progress.evaluations), _choose_among(inputs, facts, stored)
    if verdict.sweet_spot_step != wanted.sweet_spot_step:
        attempt.notes.append(
            f"step {wanted.sweet_spot_step} would have been chosen, but was significantly worse than the best of its "
            "time and so was not kept; with more held-out examples this does not happen"
        )
    return verdict


def _choose_among(inputs: Inputs, facts: TrainingFacts, stored: Sequence[Checkpoint]) -> Verdict:
    try:
        return judge(facts.progress.evaluations, kept={checkpoint.step for checkpoint in stored})
    except ValueError as error:
        candidates = judge(facts.progress.evaluations).candidate_steps
        raise RunConflictError(
            f"{inputs.artifacts.uri}: none of the checkpoints worth keeping ({list(candidates)}) is whole in the "
            "store; were they deleted or changed by hand? Start again with another --run-id"
        ) from error
