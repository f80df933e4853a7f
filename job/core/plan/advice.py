"""What a recipe will not learn well, seen before it is paid for: sentences with numbers, and what to change."""

import re
from collections.abc import Sequence

from job.core.errors import UsageError
from job.core.plan.course import Course, evaluation_count
from job.core.plan.forecast import FORWARD_SHARE
from job.core.recipe.data_section import DataSection
from job.core.recipe.schema import Optimizer, Recipe
from job.core.recipe.templates import Slot, laid_out

_FEWEST_HELD_OUT = 50
"""Below it the loss of a few odd examples decides which checkpoint is chosen."""
_MOST_EVALUATION = 0.2
"""Of the time: what is more buys little."""
_FEWEST_EVALUATIONS = 2
"""Before the first step and after the last."""
_ADAM, _LION = (1e-6, 2e-3), (1e-7, 6e-4)
_USUAL_RATES: dict[Optimizer, tuple[float, float]] = {
    "adamw_torch": _ADAM,
    "adamw_torch_fused": _ADAM,
    "adamw_8bit": _ADAM,
    "paged_adamw_8bit": _ADAM,
    "paged_adamw_32bit": _ADAM,
    "lion_8bit": _LION,
    "paged_lion_8bit": _LION,
}
"""Of adapters. Steps of sgd follow the gradient's size, so it has no usual rate."""
_BRACES = re.compile(r"\{[^\W\d][\w .-]*\??\}")
_NO_BORDER = (
    "nothing separates prompt and completion: data.prompt does not end with a space or a line break, and "
    'data.completion does not begin with one; write `completion: " {...}"`'
)
_CLOSED = ("|", ">", "]")
"""What ends a special token, as chat templates have them: it separates by itself."""


def refuse_endless_warm_up(course: Course, *, warmup_steps: int) -> None:
    """Refuse a run that ends before its learning rate is up.

    Raises:
        UsageError: the warm-up is as long as the run, or longer.
    """
    if warmup_steps >= course.steps:
        raise UsageError(
            f"train.warmup_steps is {warmup_steps} and the run has {course.steps} steps ({course.epochs:.3g} epochs of "
            f"{course.examples} examples, {course.batch_size} a step): it would end before the learning rate is up; "
            f"lower train.warmup_steps ({max(course.steps // 20, 0)} would be a twentieth), or train longer"
        )


def of_recipe(recipe: Recipe) -> list[str]:
    """What is seen without the data."""
    borders = [found for source in recipe.data.sources for found in _border(source.data)]
    return [*_learning_rate(recipe), *dict.fromkeys(borders), *_prompts(recipe)]


def of_data(
    recipe: Recipe, course: Course, *, held_out: int, training_tokens: int, validation_tokens: int
) -> list[str]:
    """What is seen once the data was read.

    Args:
        recipe: as it is.
        course: its steps over the training examples.
        held_out: examples that are judged on.
        training_tokens: of an epoch, after the cut.
        validation_tokens: of the held-out examples that are judged on, after the cut.
    """
    advice = []
    if recipe.train.batch_size > course.examples:
        advice.append(
            f"train.batch_size is {recipe.train.batch_size}, and there are {course.examples} training examples: a step "
            "sees each of them more than once; lower it"
        )
    if held_out < _FEWEST_HELD_OUT:
        advice.append(
            f"{held_out} held-out examples are few: below {_FEWEST_HELD_OUT} it is half chance which checkpoint is "
            "chosen; give more with data.validation"
        )
    share = evaluation_share(recipe, course, training_tokens=training_tokens, validation_tokens=validation_tokens)
    return [*advice, *_cheaper_evaluation(recipe, course, held_out=held_out, share=share)]


def evaluation_share(recipe: Recipe, course: Course, *, training_tokens: int, validation_tokens: int) -> float:
    """The share of the time, start-up apart, that evaluations would take; arguments as in `of_data`."""
    evaluations = evaluation_count(course.steps, recipe.evaluate.every_steps)
    judged = FORWARD_SHARE * validation_tokens * evaluations
    trained = training_tokens * course.total / course.examples
    return judged / (judged + trained)


def _cheaper_evaluation(recipe: Recipe, course: Course, *, held_out: int, share: float) -> list[str]:
    if share <= _MOST_EVALUATION:
        return []
    evaluations = evaluation_count(course.steps, recipe.evaluate.every_steps)
    # As many as take the largest share that is not too much, beside the same training.
    enough = int(held_out * (1 - share) / share * _MOST_EVALUATION / (1 - _MOST_EVALUATION) + 1e-6)
    if enough >= _FEWEST_HELD_OUT:
        change = f"set evaluate.max_examples: {enough}"
    elif evaluations > _FEWEST_EVALUATIONS:
        change = f"evaluate less often than every {recipe.evaluate.every_steps} steps (evaluate.every_steps)"
    else:
        return []  # a run of next to nothing, judged before and after it
    return [
        (
            f"evaluation would take about {share:.0%} of the time: {evaluations} times {held_out:,} held-out examples; "
            f"{change}"
        )
    ]


def _learning_rate(recipe: Recipe) -> list[str]:
    train = recipe.train
    low, high = _USUAL_RATES.get(train.optimizer, (0.0, float("inf")))
    if low <= train.learning_rate <= high:
        return []
    what = "little is learned" if train.learning_rate < low else "training may diverge"
    usual = f"{low:g} to {high:g} that are usual for {train.optimizer} and an adapter"
    return [f"train.learning_rate {train.learning_rate:g} is out of the {usual}: {what}"]


def _border(data: DataSection) -> list[str]:
    """A prompt that runs into its completion: what is learned begins in the middle of a word."""
    if data.prompt is None or data.completion is None:
        return []
    # Optional fields move the border: with all of them, and with none.
    for there in (True, False):
        given, learned = ([*laid_out(each, lambda _: there)] for each in (data.prompt, data.completion))  # noqa: B023 - used at once
        if _runs_together(_literal(given[-1:]), _literal(learned[:1])):
            return [_NO_BORDER]
    return []


def _runs_together(ends: str, begins: str) -> bool:
    """Whether nothing separates what is written after the last field of one, and before the first of the other."""
    if ends[-1:].isspace() or begins[:1].isspace() or ends.endswith(_CLOSED) or begins.startswith("<"):
        return False
    # Scripts beyond ASCII put no spaces.
    return not ((ends and not ends[-1].isascii()) or (begins and not begins[0].isascii()))


def _literal(pieces: Sequence[str | Slot]) -> str:
    """The template's own text at its end or start; empty: a field stands there."""
    return "".join(piece for piece in pieces if isinstance(piece, str))


def _prompts(recipe: Recipe) -> list[str]:
    """Prompts are taken as they are: a template's field would be asked for by its name."""
    return [
        f"evaluate.prompts.{number} holds {', '.join(dict.fromkeys(braces))}, and prompts are no templates: it is "
        "asked with its braces; write out what stands in a record"
        for number, prompt in enumerate(recipe.evaluate.prompts)
        if (braces := _BRACES.findall(prompt))
    ]
