"""Tells steps and evaluations to whoever follows the run."""

from collections.abc import Sequence

import structlog

from job.core.judging.slices import SliceLoss
from job.core.judging.verdict import Evaluation
from job.core.reports.report import SourceLoss
from job.core.reports.tracked import evaluation_numbers, step_numbers
from job.stages.attempt import Attempt
from job.tune.loop.step_record import StepRecord
from job.tune.loop.track import Tracking

log = structlog.get_logger(__name__)


class StepTeller:
    """Tells steps and evaluations to the log, the outcome file and the trackers."""

    def __init__(self, attempt: Attempt, tracking: Tracking) -> None:
        self._attempt = attempt
        self._tracking = tracking
        self._pending: list[StepRecord] = []
        self._waited = 0.0

    def step(self, record: StepRecord) -> None:
        """One event for each step, or at most one in `step_events_seconds`; the last step always."""
        sent = step_numbers(loss=record.loss, grad_norm=record.grad_norm, learning_rate=record.learning_rate)
        self._tracking.log(sent, step=record.step)
        self._attempt.standing.step = record.step
        self._pending.append(record)
        self._waited += record.seconds
        last = record.step == record.of
        if not last and self._waited < self._attempt.step_events_seconds:
            return
        seconds = sum(r.seconds for r in self._pending)
        rate = sum(r.tokens for r in self._pending) / seconds if seconds else 0.0
        eta = (record.of - record.step) * seconds / len(self._pending)
        loss = sum(r.loss for r in self._pending) / len(self._pending)
        log.info(
            "step",
            step=record.step,
            of=record.of,
            loss=round(loss, 4),
            tokens_per_second=round(rate, 1),
            eta_seconds=round(eta, 1),
            grad_norm=round(record.grad_norm, 4),
            learning_rate=record.learning_rate,
        )
        self._attempt.outcome.progress(
            phase="train", step=record.step, of=record.of, loss=loss, eta_seconds=eta, tokens_per_second=rate
        )
        self._pending, self._waited = [], 0.0

    def evaluation(
        self, result: Evaluation, sources: Sequence[SourceLoss] = (), slices: Sequence[SliceLoss] = ()
    ) -> None:
        """One event for each evaluation, with the loss of each source where there are several, and of each slice."""
        by_source = {source.name: source.loss for source in sources if source.loss is not None}
        by_slice = {f"{each.slice.field}={each.slice.words}": each.loss for each in slices}
        log.info(
            "evaluation",
            step=result.step,
            loss=round(result.loss, 4),
            perplexity=round(result.perplexity, 4),
            token_accuracy=round(result.token_accuracy, 4),
            tokens=int(result.tokens.sum()),
            **({"sources": {name: round(loss, 4) for name, loss in by_source.items()}} if by_source else {}),
            **({"slices": {name: round(loss, 4) for name, loss in by_slice.items()}} if by_slice else {}),
        )
        self._tracking.log(evaluation_numbers(result, sources, slices), step=result.step)
