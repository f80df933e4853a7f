"""The held-out examples one by one, as a report keeps them: what training did to the loss of each, and its answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from job.core.judging.verdict import Evaluation
from job.core.section import Section

MOST_DRAWN = 1000
"""Examples whose two losses a report keeps: a picture shows no more, and the report stays small."""
_MOST_NAMED = 12
_FENCE = 1.5
"""Times the middle half's width beyond it: Tukey 1977, "Exploratory Data Analysis", section 2C."""
_TWO_SIDED = 1.96
"""Standard errors of a 95 % interval."""
_DIGITS = 6


class Answer(Section):
    """One prompt, answered by both."""

    prompt: str
    expected: str | None
    base: str
    tuned: str
    where: str | None = None
    """`file:line` of the held-out example that asks it; None: it is a prompt of the recipe."""
    base_loss: float | None = None
    """Nats a target token of that example, before training ..."""
    tuned_loss: float | None = None
    """... and at the chosen step."""
    reference: str | None = None
    """What the metric compared both with, where that is not `expected` as a whole."""
    base_score: float | None = None
    """By the recipe's metric, from 0 to 1; None: not judged, or an earlier version of the job wrote the report."""
    tuned_score: float | None = None
    champion: str | None = None
    """What the model in use answered, which the run was compared with on its channel; None: there was none but the
    base, or it is not known."""
    champion_score: float | None = None


class ExactMatch(Section):
    """Held-out examples whose answer is the expected one, word for word."""

    examples: int
    base: float
    tuned: float


class ExampleLoss(Section):
    """One held-out example, before training and at the chosen step."""

    where: str
    """`file:line`."""
    tokens: int
    """Target tokens."""
    base: float
    """Nats a target token, as the next one."""
    tuned: float


class Compared(Section):
    """What training did to the held-out examples, together and one by one."""

    examples: int
    gain: float
    """Base loss less tuned loss, in nats a target token."""
    gain_plus_minus: float | None
    """Half of its 95 % interval, both judged on the same examples; None: of one alone."""
    worse: int
    """Examples whose loss has risen."""
    base: tuple[float, ...]
    """Loss of each, in nats a target token; of more than a thousand only of some, evenly from all."""
    tuned: tuple[float, ...]
    """The same after training."""
    outliers: tuple[ExampleLoss, ...]
    """Those of which much less was learned than of the others, the worst first, at most twelve: labels may be wrong."""
    outliers_in_all: int


class HeldOut(Compared):
    """What the held-out examples say, before training and at the chosen step."""

    plus_minus: tuple[float | None, ...]
    """For each evaluation half of the 95 % interval of its loss, over the examples; None: of one alone."""


class Tried(Compared):
    """The same at the best step that was trained, where none of them was better than the base."""

    step: int
    """The one with the lowest loss; that it is the best of several is no part of `gain_plus_minus`."""


def held_out(evaluations: Mapping[int, Evaluation], *, chosen: int, where: Callable[[int], str]) -> HeldOut:
    """What a report keeps of the held-out examples.

    Args:
        evaluations: by step, one of step 0 among them.
        chosen: the step that was chosen.
        where: `file:line` of an example.
    """
    return HeldOut(
        **_compared(evaluations[0], evaluations[chosen], where),
        plus_minus=tuple(plus_minus(each.nll, each.tokens) for _, each in sorted(evaluations.items())),
    )


def tried(evaluations: Mapping[int, Evaluation], *, chosen: int, where: Callable[[int], str]) -> Tried | None:
    """What a report keeps of the best step that was trained; None: a trained one was chosen, or none was judged.

    Args:
        evaluations: as in `held_out`, like the others.
        chosen: the step that was chosen.
        where: `file:line` of an example.
    """
    trained = [each for step, each in sorted(evaluations.items()) if step > 0]
    if chosen > 0 or not trained:
        return None
    best = min(trained, key=lambda each: each.loss)
    return Tried(**_compared(evaluations[0], best, where), step=best.step)


def _compared(before: Evaluation, after: Evaluation, where: Callable[[int], str]) -> dict[str, Any]:
    tokens = before.tokens
    base, tuned = before.nll / tokens, after.nll / tokens
    change = tuned - base
    far = _outliers(change)
    drawn = _evenly(len(tokens), MOST_DRAWN)
    return {
        "examples": len(tokens),
        "gain": round(before.loss - after.loss, _DIGITS),
        "gain_plus_minus": plus_minus(before.nll - after.nll, tokens),
        "worse": int((change > 0).sum()),
        "base": _rounded(base[drawn]),
        "tuned": _rounded(tuned[drawn]),
        "outliers": tuple(
            ExampleLoss(
                where=where(i),
                tokens=int(tokens[i]),
                base=round(float(base[i]), _DIGITS),
                tuned=round(float(tuned[i]), _DIGITS),
            )
            for i in far[:_MOST_NAMED]
        ),
        "outliers_in_all": len(far),
    }


def plus_minus(sums: NDArray[np.float64], tokens: NDArray[np.int64]) -> float | None:
    """Half of the 95 % interval of a mean a token, whose examples are drawn as wholes.

    Cochran 1977, "Sampling Techniques", section 6.4: the error of a ratio of two sums.
    """
    count = len(sums)
    if count < 2:  # noqa: PLR2004 - of one alone nothing is known of the others
        return None
    apart = sums - sums.sum() / tokens.sum() * tokens
    error = float(np.sqrt(count / (count - 1) * (apart**2).sum()) / tokens.sum())
    return round(_TWO_SIDED * error, _DIGITS)


def _outliers(change: NDArray[np.float64]) -> list[int]:
    """Examples whose change lies above the fence, the highest first."""
    low, high = np.percentile(change, [25, 75])
    above = np.flatnonzero(change > high + _FENCE * (high - low))
    return sorted(above.tolist(), key=lambda i: -change[i])


def _evenly(count: int, most: int) -> list[int]:
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def drawn_examples(count: int, *, most: int) -> list[int]:
    """Places of at most so many of the examples whose two losses a report keeps, evenly from all."""
    drawn = _evenly(count, MOST_DRAWN)
    return [drawn[i] for i in _evenly(len(drawn), most)]


def _rounded(losses: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(loss), _DIGITS) for loss in losses)


def loss_of_example(evaluation: Evaluation, example: int) -> float:
    """Of one held-out example, in nats a target token."""
    return round(float(evaluation.nll[example] / evaluation.tokens[example]), _DIGITS)


def exact_match(answers: Sequence[Answer]) -> ExactMatch | None:
    """Over the answers that are expected; None: there is none."""
    asked = [answer for answer in answers if answer.expected is not None]
    if not asked:
        return None
    return ExactMatch(
        examples=len(asked),
        base=sum(answer.base == answer.expected for answer in asked) / len(asked),
        tuned=sum(answer.tuned == answer.expected for answer in asked) / len(asked),
    )
