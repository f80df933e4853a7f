"""What stands in the store of a run that is not finished: its attempts, and the losses of its newest checkpoint."""

import tempfile
from pathlib import Path
from typing import Any

from job.core.attempt.run_record import recorded_objects
from job.core.judging.held_out import plus_minus
from job.core.judging.verdict import Evaluation
from job.core.reports.report import EvaluationReport, TrainingCurve
from job.edge.run.artifacts import Artifacts
from job.edge.run.checkpoints import Checkpoint
from job.edge.run.run_store import never
from job.render.page.unfinished import RunSoFar
from job.stages.finishing.report import attempt_report
from job.tune.loop.saved_state import DamagedStateError
from job.tune.loop.so_far import FILES, SoFar, read_so_far


def run_so_far(artifacts: Artifacts, record: dict[str, Any]) -> RunSoFar:
    """The run as it stands now; whoever works on it is not disturbed.

    Args:
        artifacts: the run.
        record: what run.json says.

    Raises:
        LocalDiskError: there is no room for the checkpoint's losses here.
    """
    found, notes = _newest(artifacts)
    judged = [] if found is None else [each for _, each in sorted(found.evaluations.items())]
    recipe = record.get("recipe")
    return RunSoFar(
        run_id=artifacts.run_id,
        run_uri=artifacts.uri,
        recipe=recipe if isinstance(recipe, dict) else {},
        objects=recorded_objects(record),
        attempts=[attempt_report(known) for known in artifacts.attempts()],
        step=None if found is None else found.step,
        curve=_curve(found),
        evaluations=[_evaluation(each) for each in judged],
        plus_minus=[plus_minus(each.nll, each.tokens) for each in judged],
        notes=notes,
    )


def _newest(artifacts: Artifacts) -> tuple[SoFar | None, list[str]]:
    """What the newest checkpoint that can be read says, and which could not."""
    read: list[SoFar] = []

    def refusal(checkpoint: Checkpoint, folder: Path) -> str | None:
        try:
            read.append(read_so_far(folder, step=checkpoint.step))
        except DamagedStateError as error:
            return str(error)
        return None

    with tempfile.TemporaryDirectory() as folder:
        _, passed_over = artifacts.fetch_newest(Path(folder), should_stop=never, only=FILES, refusal=refusal)
        notes = [f"{each['checkpoint']} was passed over: {each['reason']}" for each in passed_over]
        return (read[0] if read else None), [note.replace(folder, "the checkpoint") for note in notes]


def _curve(found: SoFar | None) -> TrainingCurve:
    if found is None:
        return TrainingCurve(loss=(), grad_norm=(), learning_rate=())
    return TrainingCurve(loss=found.losses, grad_norm=found.grad_norms, learning_rate=found.learning_rates)


def _evaluation(each: Evaluation) -> EvaluationReport:
    return EvaluationReport(
        step=each.step,
        loss=each.loss,
        perplexity=each.perplexity,
        token_accuracy=each.token_accuracy,
        tokens=int(each.tokens.sum()),
    )
