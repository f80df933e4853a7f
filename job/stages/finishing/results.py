"""What came of each held-out example: scores of its answers, its line beside the report, and the run before."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from job.core.errors import DataError, NotFoundError
from job.core.judging import example_results
from job.core.judging.example_results import (
    EXAMPLES_JSONL,
    ChangeReport,
    ExampleResult,
    ExamplesFile,
    judges_alike,
    loss_change,
    score_change,
)
from job.core.judging.judged_answers import MetricReport, metric_report
from job.core.judging.slices import Slice, SliceName
from job.edge.run.artifacts import Artifacts
from job.stages.attempt import Attempt
from job.stages.base.loading import Inputs
from job.stages.loop import TrainingFacts

log = structlog.get_logger(__name__)
_LOOKED_AT = 20
"""Finished runs of the output, the newest first, among which the one before is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Of both models' answers by the recipe's metric, for each held-out example: [N]; None: it was not judged."""

    base: Sequence[float | None]
    tuned: Sequence[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a report says of the examples one by one."""

    scores: Scores
    metric: MetricReport | None
    file: ExamplesFile | None
    change: ChangeReport | None


def results_of(attempt: Attempt, inputs: Inputs, facts: TrainingFacts, tuned: Sequence[str], *, step: int) -> Results:
    """Judge the answers, leave a line of each example in the store, and look at the run before.

    Args:
        attempt: whose run it is.
        inputs: what training started from.
        facts: what training left.
        tuned: the tuned model's answers, in the order of the run's questions.
        step: the chosen one.
    """
    scores = _scores(inputs, facts, tuned)
    metric = _metric(attempt, inputs, scores)
    results = _lines(inputs, facts, scores, step=step)
    file, change = None, None
    with attempt.not_at_the_cost_of_the_run(EXAMPLES_JSONL):
        content = example_results.written(results)
        inputs.artifacts.publish(EXAMPLES_JSONL, content)
        file = example_results.described(content, results)
    if file is not None:
        with attempt.not_at_the_cost_of_the_run("the change since the run before"):
            change = _change(inputs.artifacts, file, results, metric)
    _log(metric, change)
    return Results(scores=scores, metric=metric, file=file, change=change)


def _scores(inputs: Inputs, facts: TrainingFacts, tuned: Sequence[str]) -> Scores:
    judging, count = inputs.dataset.judging, len(inputs.dataset.validation)
    base: list[float | None] = [None] * count
    after: list[float | None] = [None] * count
    for question, untuned, answer in zip(facts.questions, facts.progress.base_answers or [], tuned, strict=True):
        reference = None if question.document is None else judging.references.get(question.document)
        if question.document is not None and reference is not None:
            base[question.document] = judging.metric.score(reference, untuned)
            after[question.document] = judging.metric.score(reference, answer)
    return Scores(base=base, tuned=after)


def _metric(attempt: Attempt, inputs: Inputs, scores: Scores) -> MetricReport | None:
    dataset = inputs.dataset
    return metric_report(
        dataset.judging.metric,
        scores.base,
        scores.tuned,
        asked=len(dataset.judging.asked),
        max_new_tokens=attempt.worker.recipe.evaluate.max_new_tokens,
        sources=[
            Slice(name=SliceName(field="", value=source.name), members=np.equal(dataset.validation.sources, place))
            for place, source in enumerate(dataset.report.validation.sources)
        ],
        slices=dataset.judging.slices,
    )


def _lines(inputs: Inputs, facts: TrainingFacts, scores: Scores, *, step: int) -> list[ExampleResult]:
    documents, judged = inputs.dataset.validation, facts.progress.evaluations
    tokens = documents.targets
    base, tuned = (judged[at].nll / tokens for at in (0, step))
    names = documents.names()
    return [
        ExampleResult(
            example=names[i],
            where=documents.where(i),
            tokens=int(tokens[i]),
            base_loss=float(base[i]),
            tuned_loss=float(tuned[i]),
            base_score=scores.base[i],
            tuned_score=scores.tuned[i],
        )
        for i in range(len(documents))
    ]


def _change(
    artifacts: Artifacts, file: ExamplesFile, results: Sequence[ExampleResult], metric: MetricReport | None
) -> ChangeReport | None:
    """Of the newest run before that was judged on the same examples; None: there is none."""
    for other in artifacts.finished_before(most=_LOOKED_AT):
        try:
            report = other.read_report()
            if report is None or report.per_example is None or report.per_example.validation != file.validation:
                continue
            content = other.read_beside(EXAMPLES_JSONL, max_bytes=example_results.MOST_BYTES)
            before = example_results.read(content, report.per_example)
            return ChangeReport(
                run_id=other.run_id,
                run_uri=other.uri,
                finished=report.finished,
                loss=loss_change(before, results),
                scores=score_change(before, results) if judges_alike(report.metric, metric) else None,
            )
        except (DataError, NotFoundError, ValueError) as error:
            log.warning("run_before_passed_over", run=other.uri, reason=str(error))
    return None


def _log(metric: MetricReport | None, change: ChangeReport | None) -> None:
    if metric is not None:
        by_slice = {f"{e.slice.field}={e.slice.words}": e.scores.after for e in metric.slices if e.scores is not None}
        by_source = {each.name: each.scores.after for each in metric.sources if each.scores is not None}
        log.info(
            "metric",
            name=metric.name,
            examples=metric.scores.examples,
            base=metric.scores.before,
            tuned=metric.scores.after,
            gain=metric.scores.gain,
            low=metric.scores.low,
            high=metric.scores.high,
            **({"sources": by_source} if by_source else {}),
            **({"slices": by_slice} if by_slice else {}),
        )
    if change is not None:
        log.info(
            "change",
            run_before=change.run_uri,
            examples=change.loss.examples,
            before=change.loss.before,
            after=change.loss.after,
            change=change.loss.change,
            low=change.loss.low,
            high=change.loss.high,
            **({"scores": change.scores.gain} if change.scores is not None else {}),
        )
