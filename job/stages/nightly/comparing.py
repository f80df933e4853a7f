"""A run beside the model in use and earlier ones, each judged as its results are kept, or by loading it."""

from collections.abc import Mapping

import structlog

from job.core.errors import DataError, NotFoundError
from job.core.nightly.channel import Judged, Promoted
from job.core.nightly.exam_results import ExampleResults
from job.core.nightly.fresh_evidence import FreshEvidence
from job.core.nightly.judgement import Answered, Candidate, Terms, judge_run
from job.edge.run.channels import Channel
from job.stages.attempt import Attempt
from job.stages.nightly.channel_changes import (
    compared_with,
    earlier_models,
    now_text,
    pay,
    payment_key,
    standards_of,
    today,
)
from job.stages.nightly.contenders import Contender, Examiner, in_use

log = structlog.get_logger(__name__)


def judge_loaded(
    attempt: Attempt,
    channel: Channel,
    examiner: Examiner,
    candidate: Candidate,
    *,
    against: tuple[Promoted | None, str | None],
    fresh: FreshEvidence | None = None,
) -> Judged:
    """The verdict on a run, written down; what is not kept of a model is found by loading it.

    Args:
        attempt: with the recipe, and notes for what could not be compared.
        channel: the channel.
        examiner: asks the models.
        candidate: the run, and other trainings of its recipe.
        against: what it is compared with, and its ETag, as `Channel.promoted` gave them. Where that is replaced before
            the verdict is carried out, the swap is lost.
        fresh: what fresh records say of it, for which was paid; None: a test is paid now.

    Raises:
        NotFoundError: an adapter that it needs is gone from the store, and was not judged in this way before.
    """
    recipe = attempt.worker.recipe
    promoted, etag = against
    champion = in_use(promoted)
    mine = examiner.results(Contender(run_id=candidate.run_id, adapter=candidate.adapter), with_answers=True)
    theirs = examiner.results(champion, with_answers=True)
    others = {
        called: results
        for called, entry in earlier_models(channel, promoted).items()
        if (results := _unless_gone(attempt, examiner, in_use(entry), called)) is not None
    }
    frozen = examiner.exams.frozen.exam
    by_seed = [Contender(run_id=each.run_id, adapter=each.adapter) for each in candidate.others]
    others_by_seed = tuple(examiner.results(each)[frozen.name] for each in by_seed)

    def on(name: str, by_seed: tuple[ExampleResults, ...] = ()) -> Answered:
        return Answered(
            exam=next(each.exam for each in examiner.exams.every if each.exam.name == name),
            challenger=mine[name],
            champion=theirs[name],
            seeds=by_seed,
            earlier={called: each[name] for called, each in others.items()},
        )

    regression = examiner.exams.regression
    key = payment_key(candidate.run_id, candidate.round)
    level = pay(channel, recipe, key) if fresh is None else fresh.level
    judged = judge_run(
        candidate,
        on(frozen.name, others_by_seed),
        None if regression is None else on(regression.exam.name),
        Terms(
            champion=champion.called,
            compared=compared_with(promoted, etag),
            standards=standards_of(recipe),
            level=level,
            fresh=fresh,
            time=now_text(),
            day=today(),
        ),
    )
    return channel.record_judged(judged)


def again(judged: Judged, number: int) -> Candidate:
    """A run that was judged before, to be judged another time."""
    return Candidate(
        run_id=judged.run_id,
        run_uri=judged.run_uri,
        round=number,
        adapter=judged.adapter,
        base=judged.base,
        revision=judged.revision,
        others=judged.others,
        checkpoints=judged.checkpoints,
    )


def _unless_gone(
    attempt: Attempt, examiner: Examiner, earlier: Contender, called: str
) -> Mapping[str, ExampleResults] | None:
    """Of an earlier model; a run that somebody has deleted since must not hold up the nights."""
    try:
        return examiner.results(earlier)
    except (NotFoundError, DataError) as error:
        log.warning("not_compared", model=called, run_id=earlier.run_id, reason=str(error))
        attempt.notes.append(f"not compared with {called}: {attempt.hide(str(error))}")
        return None
