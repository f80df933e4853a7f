"""What a channel's models are asked of the held-out examples, and how wrong each answer is by the recipe's metric."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from job.core.judging.answer_metrics import AnswerMetric
from job.core.nightly.exam_results import GivenAnswers, given_answers, name_of
from job.core.recipe.schema import Recipe
from job.stages.attempt import Attempt
from job.stages.base.loading import Inputs
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.evaluate import Question, answer, questions_of_documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Held-out questions that have what an answer can be compared with; the same for every model of a night."""

    name: str
    """Hash of the questions, of what answers are compared with, how, and of where they are cut."""
    questions: tuple[Question, ...]
    references: Mapping[int, str]
    """By document."""
    metric: AnswerMetric

    @property
    def places(self) -> tuple[int, ...]:
        """The documents that ask, in the order of the questions."""
        return tuple(question.document for question in self.questions if question.document is not None)

    def judged(self, answers: Mapping[int, str]) -> GivenAnswers:
        """Answers to all of them, by document, with how wrong each is."""
        wrong = [1 - self.metric.score(self.references[place], answers[place]) for place in self.places]
        return given_answers(self.name, self.places, wrong, [answers[place] for place in self.places])


def asked_of(inputs: Inputs, recipe: Recipe) -> Asked | None:
    """What tonight's models are asked; None: nothing that the recipe's metric could judge."""
    judging = inputs.dataset.judging
    judged = recipe.data.held_out_sources or recipe.data.sources
    every = questions_of_documents(
        inputs.dataset.validation,
        inputs.tokenizer,
        most=recipe.evaluate.answers,
        sources=[place for place, source in enumerate(judged) if source.data.has_prompt],
    )
    questions = tuple(each for each in every if each.document in judging.references)
    if not questions:
        return None
    sha256 = hashlib.sha256()
    for each in questions:
        assert each.document is not None, "it is a held-out one"
        sha256.update(repr((each.document, each.ids, each.ends, judging.references[each.document])).encode())
    name = name_of(
        {
            "questions": sha256.hexdigest(),
            "metric": asdict(judging.metric),
            "max_new_tokens": recipe.evaluate.max_new_tokens,
        }
    )
    return Asked(name=name, questions=questions, references=judging.references, metric=judging.metric)


def answers_of(attempt: Attempt, inputs: Inputs, asked: Asked, model: PackedModel) -> GivenAnswers:
    """Ask a model that is loaded; this process alone, with whom the others share a base that is sharded."""
    recipe = attempt.worker.recipe
    texts = answer(
        model,
        asked.questions,
        inputs.tokenizer,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        seed=recipe.train.seed,
        should_stop=attempt.moves_on,  # asked after each token
    )
    return asked.judged(dict(zip(asked.places, texts, strict=True)))


def answers_known(asked: Asked | None, questions: Sequence[Question], texts: Sequence[str]) -> GivenAnswers | None:
    """The same of a model that a run has asked its own questions already, of which these are some."""
    if asked is None:
        return None
    by_document = {q.document: text for q, text in zip(questions, texts, strict=True) if q.document is not None}
    return asked.judged(by_document)
