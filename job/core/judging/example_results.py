"""Each held-out example's results as lines beside a report, and what they say of the run before.

Later runs are compared by them, example by example: two runs were judged on the same set where its hash is the same.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, ValidationError

from job.core.attempt.run_record import first_mistake
from job.core.judging.judged_answers import Gain, MetricReport, gain_of
from job.core.judging.paired import FEWEST, gap_of, pairs_of
from job.core.section import Count, NotNegative, Section, Whole

EXAMPLES_JSONL = "examples.jsonl"
MOST_BYTES = 2**28
_DIGITS = 6
Score = Annotated[float, Field(strict=True, ge=0, le=1)]


class ExampleResult(Section):
    """One held-out example: a line of the file."""

    example: str
    """Names its content wherever it stands: a hash of its text and of what is learned of it."""
    where: str
    """`file:line`."""
    tokens: Count
    """Target tokens."""
    base_loss: NotNegative
    """Nats a target token, before training ..."""
    tuned_loss: NotNegative
    """... and at the chosen step."""
    base_score: Score | None = None
    """Of the base's answer by the recipe's metric, from 0 to 1; None: it was not asked, or cannot be judged."""
    tuned_score: Score | None = None
    """Of the tuned model's."""


class ExamplesFile(Section):
    """The file of all of them."""

    name: str
    size: Whole
    """Bytes."""
    sha256: str
    examples: Whole
    """Lines."""
    validation: str
    """Hash of the held-out examples, in whatever order: their content, and how many target tokens each has."""


class LossChange(Section):
    """Held-out loss in nats a target token, of the run before and now."""

    examples: Whole
    before: float
    after: float
    change: float
    """Below 0: it is lower now."""
    low: float | None = None
    """End of the change's 95 % interval, paired over the examples; None: too few examples to say."""
    high: float | None = None
    """The other end."""


class ChangeReport(Section):
    """What has changed since the run before in the same output, on the same held-out examples."""

    run_id: str
    run_uri: str
    finished: str
    """UTC, ISO 8601."""
    loss: LossChange
    scores: Gain | None = None
    """Of the answers, where both runs judged them by the same metric; before and after are both tuned models'."""


def written(results: Iterable[ExampleResult]) -> bytes:
    """The file."""
    lines = (json.dumps(each.model_dump(), ensure_ascii=False, separators=(",", ":")) for each in results)
    return "".join(f"{line}\n" for line in lines).encode()


def described(content: bytes, results: Sequence[ExampleResult]) -> ExamplesFile:
    """What a report says of the file."""
    return ExamplesFile(
        name=EXAMPLES_JSONL,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        examples=len(results),
        validation=validation_hash(results),
    )


def validation_hash(results: Iterable[ExampleResult]) -> str:
    """Names a set of held-out examples as a tokenizer sees them."""
    lines = sorted(f"{each.example}:{each.tokens}\n" for each in results)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read(content: bytes, file: ExamplesFile) -> list[ExampleResult]:
    """The results that a report's file holds.

    Raises:
        ValueError: it is not the file that the report describes.
    """
    if len(content) != file.size or hashlib.sha256(content).hexdigest() != file.sha256:
        raise ValueError("its bytes are not those that the report names")
    try:
        results = [ExampleResult.model_validate_json(line) for line in content.splitlines()]
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from error
    if len(results) != file.examples or validation_hash(results) != file.validation:
        raise ValueError("its examples are not those that the report names")
    return results


def loss_change(before: Sequence[ExampleResult], now: Sequence[ExampleResult]) -> LossChange:
    """How the tuned models' losses differ on the same examples."""
    pairs = _paired(before, now)
    tokens = np.array([new.tokens for _, new in pairs], dtype=np.int64)
    old, new = (np.array([pair[side].tuned_loss for pair in pairs], dtype=np.float64) * tokens for side in (0, 1))
    gap = gap_of(pairs_of(new, old, tokens))
    low, high = (gap.low or 0.0, gap.high or 0.0) if gap.clusters >= FEWEST else (None, None)
    return LossChange(
        examples=len(pairs),
        before=round(float(old.sum() / tokens.sum()), _DIGITS),
        after=round(float(new.sum() / tokens.sum()), _DIGITS),
        change=round(gap.mean, _DIGITS),
        low=None if low is None else round(low, _DIGITS),
        high=None if high is None else round(high, _DIGITS),
    )


def score_change(before: Sequence[ExampleResult], now: Sequence[ExampleResult]) -> Gain | None:
    """How the tuned models' answers differ, over the examples that both judged; None: there is none."""
    scores = [(old.tuned_score, new.tuned_score) for old, new in _paired(before, now)]
    both = np.array([pair for pair in scores if None not in pair], dtype=np.float64).reshape(-1, 2)
    return gain_of(both[:, 0], both[:, 1])


def judges_alike(one: MetricReport | None, other: MetricReport | None) -> bool:
    """Whether two runs' scores mean the same."""
    if one is None or other is None:
        return False
    kinds = [(each.name, each.pattern, each.field, each.max_new_tokens) for each in (one, other)]
    return kinds[0] == kinds[1]


def _paired(before: Sequence[ExampleResult], now: Sequence[ExampleResult]) -> list[tuple[ExampleResult, ExampleResult]]:
    """The same examples of both, whatever their order; one that stands there twice is paired in its order."""
    old, new = (sorted(side, key=lambda each: (each.example, each.tokens)) for side in (before, now))
    return list(zip(old, new, strict=True))
