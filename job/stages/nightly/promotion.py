"""A channel after a night has trained: is its model better than the one in use, and if so, it takes its place."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from job.core.judging.held_out import Answer
from job.core.judging.verdict import Evaluation
from job.core.nightly.channel import AdapterFileInUse, AdapterInUse, Judged, NightWork, OtherTraining
from job.core.nightly.judgement import Candidate
from job.core.nightly.promotion_report import PromotionReport
from job.core.plan.course import evaluation_count
from job.core.reports.report import Report
from job.edge.run.artifacts import Artifacts
from job.edge.store.folder import FileEntry
from job.stages.attempt import Attempt
from job.stages.base.loading import Inputs
from job.stages.loop import TrainingFacts
from job.stages.nightly.answering import answers_known
from job.stages.nightly.channel_changes import (
    budget_report,
    carry_out,
    first_state,
)
from job.stages.nightly.comparing import judge_loaded
from job.stages.nightly.contenders import Contender, Examiner, in_use
from job.stages.nightly.night import Night
from job.tune.engines.packed_model import PackedModel
from job.tune.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The run's adapter as the store has it, with what it gave when it was proved and asked."""

    files: dict[str, FileEntry]
    proven: Evaluation
    answers: Sequence[str]
    """To the run's questions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """Tonight's model, judged on everything while it was loaded."""

    contender: Contender
    examiner: Examiner
    others: tuple[OtherTraining, ...]
    """Of the same recipe."""
    checkpoints: int
    """That were to be judged on the frozen examples, this one among them."""


def examine(
    attempt: Attempt,
    inputs: Inputs,
    facts: TrainingFacts,
    night: Night,
    model: PackedModel,
    published: Published,
    world: World,
) -> Examined:
    """Judge the published adapter, while it is loaded, on what it was not judged on yet.

    Args:
        attempt: this process.
        inputs: the run.
        facts: how it was trained.
        night: the channel.
        model: the published adapter, as it was loaded to be proven.
        published: what it gave then.
        world: the others, who have a base that is sharded with us.
    """
    with attempt.phases.phase("judge"):
        examiner = Examiner(
            attempt,
            inputs,
            night.channel,
            night.exams,
            left_to_peft=facts.left_to_peft,
            rows=facts.rows,
            tokens_at_once=facts.progress.cut.evaluation_tokens,
            world=world,
        )
        adapter = _adapter_of(inputs.artifacts.uri, published.files)
        contender = Contender(run_id=inputs.artifacts.run_id, adapter=adapter)
        examiner.of_loaded(
            contender,
            model,
            known={night.exams.frozen.exam.name: published.proven.nll},
            answers=answers_known(night.exams.asked, facts.questions, published.answers),
        )
    other = night.other
    others = () if other is None else (OtherTraining(run_id=other.run_id, adapter=_adapter_in(other)),)
    planned = evaluation_count(facts.course.steps, attempt.worker.recipe.evaluate.every_steps)
    return Examined(contender=contender, examiner=examiner, others=others, checkpoints=planned)


def judged_files(night: Night, artifacts: Artifacts) -> dict[str, FileEntry] | None:
    """The published files that a verdict of an attempt before is on; None: it was not judged, or they were deleted."""
    judged = night.channel.last_judged(artifacts.run_id)
    if judged is None:
        return None
    files = _entries(judged.adapter)
    return files if artifacts.holds_adapter(files) else None


def promote(
    attempt: Attempt, inputs: Inputs, night: Night, examined: Examined, *, trained: Report
) -> tuple[PromotionReport, tuple[Answer, ...]]:
    """Judge the run beside the model in use, and do what comes of it; what an attempt before did stands.

    Args:
        attempt: this process.
        inputs: the run.
        night: the channel.
        examined: tonight's model.
        trained: the run's report, which does not say yet what came of it.

    Returns:
        What came of it, and the run's answers with those of the model in use.

    Raises:
        NotFoundError: the adapter in use is gone from the store.
    """
    recipe, channel = attempt.worker.recipe, night.channel
    with attempt.phases.phase("judge"):
        judged = channel.last_judged(inputs.artifacts.run_id)
        if judged is None or not _is_on(judged, examined.contender):
            judged = _judge(attempt, inputs, night, examined, number=1 if judged is None else judged.round + 1)
    with attempt.phases.phase("promote"):
        done = carry_out(channel, recipe, judged, night.copy, work=work_of(trained))
    state, _ = channel.state()
    promotion = PromotionReport(
        channel=channel.name,
        channel_uri=channel.uri,
        outcome=done.outcome,
        said=done.said,
        replaced_by=done.replaced_by,
        judged=judged,
        budget=budget_report(state or first_state(recipe)()),
        new=night.new,
        late=night.late,
        parent=night.parent,
        fresh_promotion=night.fresh_promotion,
        also=night.also,
        conditional=channel.conditional,
    )
    return promotion, _beside_champion(trained.answers, night, judged)


def _beside_champion(answers: Sequence[Answer], night: Night, judged: Judged) -> tuple[Answer, ...]:
    """The run's answers with those of the model that it was compared with, where that is another one than the base."""
    changes = (change for change in night.channel.changes() if change.sequence == judged.compared.sequence)
    champion = in_use(next(changes, None))
    kept = night.channel.results(champion.kept_as, exam=judged.exam, how=judged.how, model=champion.model)
    asked = night.exams.asked
    if champion.run_id is None or kept is None or kept.answers is None or asked is None:
        return tuple(answers)
    if kept.answers.asked != asked.name:
        return tuple(answers)
    texts = kept.answers.texts
    wrong = dict(zip(kept.answers.places[: len(texts)], kept.answers.wrong, strict=False))
    documents = night.exams.frozen.documents
    theirs = {
        documents.where(place): {"champion": text, "champion_score": 1 - wrong[place]}
        for place, text in zip(kept.answers.places, texts, strict=False)
    }
    return tuple(each.model_copy(update=theirs.get(each.where or "", {})) for each in answers)


def work_of(trained: Report) -> NightWork:
    """What a run took, over its attempts."""
    held = [
        (datetime.fromisoformat(each.ended) - datetime.fromisoformat(each.started)).total_seconds()
        for each in trained.attempts
        if each.started and each.ended
    ]
    return NightWork(
        device=trained.attempts[-1].device,
        attempts=len(trained.attempts),
        held_seconds=sum(max(0.0, seconds) for seconds in held),
        train_seconds=trained.throughput.seconds,
        tokens=trained.throughput.tokens,
        ranks=trained.throughput.ranks,
    )


def _is_on(judged: Judged, contender: Contender) -> bool:
    """Whether a verdict is on this adapter: a run that was deleted and done anew may be another model."""
    return contender.adapter is not None and judged.adapter.files == contender.adapter.files


def _judge(attempt: Attempt, inputs: Inputs, night: Night, examined: Examined, *, number: int) -> Judged:
    identity, adapter = inputs.base.identity, examined.contender.adapter
    assert adapter is not None, "a run has one"
    candidate = Candidate(
        run_id=inputs.artifacts.run_id,
        run_uri=inputs.artifacts.uri,
        round=number,
        adapter=adapter,
        base=identity.source,
        revision=identity.revision,
        others=examined.others,
        checkpoints=examined.checkpoints,
    )
    return judge_loaded(attempt, night.channel, examined.examiner, candidate, against=night.channel.promoted())


def _adapter_of(run_uri: str, files: dict[str, FileEntry]) -> AdapterInUse:
    return AdapterInUse(
        uri=f"{run_uri}/adapter",
        files={name: AdapterFileInUse(size=file.size, sha256=file.sha256) for name, file in files.items()},
    )


def _adapter_in(report: Report) -> AdapterInUse:
    files = {name: FileEntry(size=file.size, sha256=file.sha256) for name, file in report.adapter.files.items()}
    return _adapter_of(report.run_uri, files)


def _entries(adapter: AdapterInUse) -> dict[str, FileEntry]:
    return {name: FileEntry(size=file.size, sha256=file.sha256) for name, file in adapter.files.items()}
