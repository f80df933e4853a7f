"""What held-out examples are judged by: slices by their fields, and what each answer is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.core.errors import DataError
from job.core.judging.answer_metrics import AnswerMetric
from job.core.judging.slices import Slice, slices_of
from job.core.recipe.schema import Recipe
from job.tune.data.asked import asked_and_learned, asked_documents
from job.tune.data.documents import Documents

_NAMED = 3
"""Examples that a message names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """Of the held-out documents, by their places."""

    metric: AnswerMetric
    asked: Sequence[int]
    """Documents that both models answer, in this order."""
    references: Mapping[int, str]
    """What their answers are compared with, by document; those without one are not judged."""
    slices: Sequence[Slice]
    """By field and value."""
    notes: Sequence[str]
    """What a reader should know of it."""


def judging_of(recipe: Recipe, validation: Documents, tokenizer: Any) -> Judging:
    """What the recipe's metric and slices find in the held-out documents.

    Raises:
        DataError: none of them has what an answer could be compared with, or a field that the recipe names.
    """
    evaluation, fields = recipe.evaluate, recipe.evaluate.kept_fields
    judged = recipe.data.held_out_sources or recipe.data.sources
    asked = asked_documents(
        validation,
        most=evaluation.answers,
        sources=[place for place, source in enumerate(judged) if source.data.has_prompt],
    )
    kept = {name: [validation.kept(i, place) for i in range(len(validation))] for place, name in enumerate(fields)}
    for name, values in kept.items():
        if not any(value is not None for value in values):
            raise DataError(
                f"evaluate.{'metric_field' if name == evaluation.metric_field else 'slices'}: no held-out example has "
                f'"{name}" ({validation.where(0)} has not); correct the name, or leave it out'
            )
    texts = _texts(validation, asked, tokenizer, kept.get(evaluation.metric_field or ""))
    metric = evaluation.answer_metric
    found = {i: reference for i, text in texts.items() if (reference := metric.reference(text or "")) is not None}
    _refuse_none(metric, validation, asked, found)
    return Judging(
        metric=metric,
        asked=asked,
        references=found,
        slices=[each for name in evaluation.slices for each in slices_of(name, kept[name])],
        notes=_notes(metric, validation, [i for i in asked if i not in found]),
    )


def _texts(
    validation: Documents, asked: Sequence[int], tokenizer: Any, field: Sequence[str | None] | None
) -> dict[int, str | None]:
    if field is not None:
        return {i: field[i] for i in asked}
    return {i: tokenizer.decode(asked_and_learned(validation, i)[1], skip_special_tokens=True) for i in asked}


def _refuse_none(metric: AnswerMetric, validation: Documents, asked: Sequence[int], found: Mapping[int, str]) -> None:
    if asked and not found and metric != AnswerMetric():
        raise DataError(
            f"evaluate.metric: {_lacking(metric)}, in any of the {len(asked)} held-out examples that are asked "
            f"({validation.where(asked[0])} is the first); correct evaluate.pattern or evaluate.metric_field, or "
            "choose another metric"
        )


def _lacking(metric: AnswerMetric) -> str:
    place = "the learned answer" if metric.field is None else f'"{metric.field}"'
    match metric.name:
        case "pattern":
            return f"no match of {metric.pattern} in {place}"
        case "json_equal":
            return f"no JSON as {place}"
        case _:
            return f"no word in {place}"


def _notes(metric: AnswerMetric, validation: Documents, without: Sequence[int]) -> list[str]:
    if not without:
        return []
    named = ", ".join(validation.where(i) for i in without[:_NAMED])
    more = f" and {len(without) - _NAMED} more" if len(without) > _NAMED else ""
    return [f"answers that are not judged, with {_lacking(metric)}: {named}{more}"]
