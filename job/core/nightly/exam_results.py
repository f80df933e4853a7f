"""What models made of the same examples, one by one, as a channel keeps it: a night need not ask its champion again.

An exam is a set of examples with what belongs together among them; a result is one model's. Both are named by a hash of
all that decides their numbers, and hold a hash of the numbers themselves: what does not agree with either is not used,
and the model is judged anew.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from job.core.attempt.run_record import first_mistake
from job.core.judging.paired import Pairs, pairs_of
from job.core.section import Count, Section, Text, Whole

RESULTS_VERSION: Literal[1] = 1
MOST_VALUES = 50
"""Slices of one field: beyond it a field does not divide the examples, it names them."""
MOST_TEXTS, LONGEST_TEXT = 500, 2000
"""Answers that are kept as text, and characters of each: a page shows no more."""
_NAME = 32
"""Letters of a hash that name an object."""


class Exam(Section):
    """Examples that models are judged on."""

    version: Literal[1] = RESULTS_VERSION
    name: Text
    """Hash of the examples as they are asked: ids, what is learned of them, clusters and slices."""
    tokens: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Target tokens of each."""
    cluster: tuple[Whole, ...] | None = None
    """A number for each, the same for those that depend on each other; None: none do."""
    slices: dict[str, tuple[Whole, ...]] = Field(default_factory=dict)
    """Places of the examples of each guarded slice, by `field=value`."""
    where: tuple[str, ...] = ()
    """`file:line` of each, for people: no part of the name. Empty: it was kept by an earlier version of the job."""

    @model_validator(mode="after")
    def _is_of_one_size(self) -> Self:
        number = len(self.tokens)
        if self.cluster is not None and len(self.cluster) != number:
            raise ValueError("cluster: not a number for each example")
        if self.where and len(self.where) != number:
            raise ValueError("where: not a line for each example")
        if any(place >= number for places in self.slices.values() for place in places):
            raise ValueError("slices: a place lies behind the last example")
        return self

    def slice_masks(self) -> dict[str, NDArray[np.bool_]]:
        """Which examples are in each slice: [N] each."""
        masks = {}
        for name, places in self.slices.items():
            masks[name] = np.zeros(len(self.tokens), dtype=bool)
            masks[name][list(places)] = True
        return masks


class GivenAnswers(Section):
    """One model's own answers to some of an exam's examples."""

    asked: Text
    """Hash of the questions, of what answers are compared with, and how."""
    places: tuple[Whole, ...]
    """The examples that ask."""
    wrong: tuple[Annotated[float, Field(strict=True, ge=0, le=1)], ...]
    """By how much each answer is wrong."""
    texts: Annotated[tuple[Annotated[str, Field(max_length=LONGEST_TEXT)], ...], Field(max_length=MOST_TEXTS)]
    """The first answers, for people; a long one is cut."""

    @model_validator(mode="after")
    def _is_of_one_size(self) -> Self:
        if len(self.wrong) != len(self.places) or len(self.texts) > len(self.places):
            raise ValueError("answers: not a number for each question")
        if len(set(self.places)) != len(self.places):
            raise ValueError("answers: an example asks twice")
        return self


class ExampleResults(Section):
    """One model's results on one exam."""

    version: Literal[1] = RESULTS_VERSION
    model: Text
    """Hash of the adapter's weights, or `base`."""
    exam: Text
    how: Text
    """Hash of what else decides the numbers: the base, its 4 bits, the device, the libraries, the job's own code, and
    by whose layers and in which rows it was computed."""
    nll: tuple[Annotated[float, Field(strict=True, allow_inf_nan=False)], ...]
    """Summed loss of each example, in nats."""
    answers: GivenAnswers | None = None
    """A second measure; None: the model was not asked."""
    digest: Text
    """Hash of the numbers."""

    @model_validator(mode="after")
    def _is_what_was_written(self) -> Self:
        if self.answers is not None and any(place >= len(self.nll) for place in self.answers.places):
            raise ValueError("answers: a place lies behind the last example")
        if self.digest != _digest_of(self.nll, self.answers):
            raise ValueError("digest: not that of the numbers")
        return self

    @property
    def loss_sum(self) -> float:
        """Summed loss of all examples, in nats."""
        return sum(self.nll)

    def without_answers(self) -> "ExampleResults":
        """The losses alone: answers to what is asked no more are compared with none."""
        return results_of(self.nll, model=self.model, exam=self.exam, how=self.how)


def results_of(
    nll: NDArray[np.float64] | Sequence[float],
    *,
    model: str,
    exam: str,
    how: str,
    answers: GivenAnswers | None = None,
) -> ExampleResults:
    """One model's results, as they are kept."""
    losses = tuple(map(float, nll))
    return ExampleResults(
        model=model, exam=exam, how=how, nll=losses, answers=answers, digest=_digest_of(losses, answers)
    )


def given_answers(asked: str, places: Sequence[int], wrong: Sequence[float], texts: Sequence[str]) -> GivenAnswers:
    """One model's answers, as they are kept.

    Args:
        asked: names the questions and how they are judged.
        places: of the examples that ask.
        wrong: by how much each answer is wrong, 0 to 1.
        texts: all of them.
    """
    kept = tuple(text[:LONGEST_TEXT].encode("utf-8", "replace").decode() for text in texts[:MOST_TEXTS])
    return GivenAnswers(asked=asked, places=tuple(places), wrong=tuple(map(float, wrong)), texts=kept)


def loss_of(exam: Exam, results: ExampleResults) -> float:
    """Nats a target token; every token counts the same."""
    return results.loss_sum / sum(exam.tokens)


def pairs_on(exam: Exam, challenger: ExampleResults, champion: ExampleResults) -> Pairs:
    """Two models beside each other.

    Raises:
        ValueError: they were not judged on these examples, or not in the same way.
    """
    if (challenger.exam, challenger.how) != (champion.exam, champion.how) or challenger.exam != exam.name:
        raise ValueError("champion and challenger were not judged on the same examples in the same way")
    return pairs_of(np.array(challenger.nll), np.array(champion.nll), np.array(exam.tokens), _clusters(exam))


def asked_alike(one: ExampleResults, other: ExampleResults) -> bool:
    """Whether both answered the same questions, judged in the same way, or neither was asked."""
    asked = [None if each.answers is None else (each.answers.asked, each.answers.places) for each in (one, other)]
    return asked[0] == asked[1]


def answer_pairs_on(exam: Exam, challenger: ExampleResults, champion: ExampleResults) -> Pairs | None:
    """The same of their answers; None: neither was asked.

    Raises:
        ValueError: they were not asked the same, or not judged in the same way.
    """
    if not asked_alike(challenger, champion):
        raise ValueError("champion and challenger did not answer the same questions")
    ours, theirs = challenger.answers, champion.answers
    if ours is None or theirs is None:
        return None
    clusters = _clusters(exam)
    own = None if clusters is None else clusters[list(ours.places)]
    return pairs_of(np.array(ours.wrong), np.array(theirs.wrong), np.ones(len(ours.places)), own)


def _clusters(exam: Exam) -> NDArray[np.int64] | None:
    return None if exam.cluster is None else np.array(exam.cluster)


def name_of(content: Mapping[str, Any]) -> str:
    """A short name for JSON content: the same content has the same name."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:_NAME]


def _digest_of(nll: tuple[float, ...], answers: GivenAnswers | None) -> str:
    return name_of({"nll": nll, "answers": None if answers is None else answers.model_dump(mode="json")})


def read_exam(content: dict[str, Any]) -> Exam:
    """The exam that a JSON object is.

    Raises:
        ValueError: it is none, with the first value that is wrong.
    """
    try:
        return Exam.model_validate(content)
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from error


def read_results(content: dict[str, Any]) -> ExampleResults:
    """The results that a JSON object is.

    Raises:
        ValueError: it is none, with the first value that is wrong.
    """
    try:
        return ExampleResults.model_validate(content)
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from error
