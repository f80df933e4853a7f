"""What trackers hear of a run: its recipe as flat values, and in the end the report's figures by name."""

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from job.core.judging.judged_answers import MetricReport
from job.core.judging.slices import SliceLoss
from job.core.judging.verdict import Evaluation
from job.core.reports.report import Report, SourceLoss

_LONGEST = 500
"""Characters of a value, within the limits of every tracker."""
_LONGEST_ID = 64
_LONGEST_PART = 80
"""Characters of a part of a name: MLflow takes 250 of all."""
_NO_PART = re.compile(r"[^\w.\-]")
"""What MLflow refuses in a name or TensorBoard writes otherwise, and what would part it."""


def tracked_key(run_id: str, run_uri: str) -> str:
    """The id of the tracked run: every attempt's, and nobody else's. The same recipe may run into two outputs."""
    return f"{run_id[:_LONGEST_ID]}-{sha256(run_uri.encode()).hexdigest()[:8]}"


def tracked_recipe(recipe: Mapping[str, Any]) -> dict[str, str | int | float]:
    """`section.key` -> its value; what is not set is left out, and what is long is cut."""
    found: dict[str, str | int | float] = {}
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": inner for key, inner in tracked_recipe(value).items()}
        elif isinstance(value, list | tuple):
            found[name] = ", ".join(map(str, value))[:_LONGEST]
        elif isinstance(value, int | float):
            found[name] = value
        elif value is not None:
            found[name] = str(value)[:_LONGEST]
    return found


def step_numbers(*, loss: float, grad_norm: float, learning_rate: float) -> dict[str, float]:
    """What is sent of a step."""
    return {"train/loss": loss, "train/grad_norm": grad_norm, "train/learning_rate": learning_rate}


def evaluation_numbers(
    result: Evaluation, sources: Sequence[SourceLoss] = (), slices: Sequence[SliceLoss] = ()
) -> dict[str, float]:
    """What is sent of an evaluation, with the loss of each source where there are several, and of each slice."""
    by_source = {f"validation/loss/{_path(each.name)}": each.loss for each in sources if each.loss is not None}
    by_slice = {f"validation/loss_by_{_part(each.slice.field)}/{_part(each.slice.words)}": each.loss for each in slices}
    return {"validation/loss": result.loss, "validation/token_accuracy": result.token_accuracy} | by_source | by_slice


def tracked_figures(report: Report) -> dict[str, float]:
    """What the run came to."""
    spot, match, speed = report.sweet_spot, report.exact_match, report.throughput
    figures = {
        "final/validation_loss_base": spot.base_loss,
        "final/validation_loss": spot.loss,
        "final/chosen_step": spot.step,
        "final/held_out_examples": report.data.validation.used,
        "final/tokens_per_second": speed.tokens_per_second,
    }
    if match is not None:
        figures |= {"final/exact_match_base": match.base, "final/exact_match": match.tuned}
    return figures if report.metric is None else figures | _metric_figures(report.metric)


def _metric_figures(metric: MetricReport) -> dict[str, float]:
    """Mean scores of both models' answers, and the gain with its paired interval where there is one."""
    scores = metric.scores
    name = f"final/{metric.name}" if metric.field is None else f"final/{metric.name}_of_field"
    around = {f"{name}_gain_low": scores.low, f"{name}_gain_high": scores.high}
    return {
        f"{name}_base": scores.before,
        name: scores.after,
        f"{name}_gain": scores.gain,
        f"{name}_examples": scores.examples,
    } | {end: value for end, value in around.items() if value is not None}


def _path(text: str) -> str:
    """A source's name, which may be a data set's: `owner/name`."""
    return "/".join(map(_part, text.split("/")[:2])) if text.count("/") == 1 else _part(text)


def _part(text: str) -> str:
    """A part of a name that every tracker takes; what has to go from a text, its hash replaces."""
    said = _NO_PART.sub("_", text).strip(".")[:_LONGEST_PART]
    return said if said == text != "" else f"{said}-{sha256(text.encode('utf-8', 'replace')).hexdigest()[:6]}"
