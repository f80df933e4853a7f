"""What trackers hear of a run: its recipe as flat values, and in the end the report's figures by name."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from job.core.report import Report, SourceLoss
from job.core.verdict import Evaluation

_LONGEST = 500
"""Characters of a value, within the limits of every tracker."""
_LONGEST_ID = 64


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


def evaluation_numbers(result: Evaluation, sources: Sequence[SourceLoss] = ()) -> dict[str, float]:
    """What is sent of an evaluation, with the loss of each source where there are several."""
    by_source = {f"validation/loss/{each.name}": each.loss for each in sources if each.loss is not None}
    return {"validation/loss": result.loss, "validation/token_accuracy": result.token_accuracy} | by_source


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
    return figures
