"""Which checkpoint to keep, and where overfitting begins: statistics on evaluation results."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
"""Bootstrap resamples of the examples."""
CONFIDENCE = 0.95
"""One-sided: a checkpoint counts as worse when its loss is higher in at least this share of the resamples."""


NOTHING_BETTER = "nothing better than the base was found"
"""The verdict where the checkpoint to keep is that of step 0, before any training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out loss of each example at one step."""

    step: int
    nll: NDArray[np.float64]
    """Sum of the token losses of each example, in nats: [N]."""
    tokens: NDArray[np.int64]
    """Target tokens of each example: [N]."""
    correct: int
    """Target tokens that were the model's first choice."""

    @property
    def loss(self) -> float:
        """Mean loss of a target token, in nats: every token counts the same."""
        return float(self.nll.sum() / self.tokens.sum())

    def loss_of(self, examples: NDArray[np.bool_]) -> float | None:
        """The same over some of the examples, [N]; None: there is none."""
        tokens = int(self.tokens[examples].sum())
        return float(self.nll[examples].sum() / tokens) if tokens else None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return float(np.exp(min(self.loss, 700.0)))

    @property
    def token_accuracy(self) -> float:
        """Share of the target tokens that were the model's first choice."""
        return self.correct / int(self.tokens.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the evaluations say together."""

    best_step: int
    """Lowest validation loss."""
    sweet_spot_step: int
    """The earliest evaluation that is not significantly worse than the best: the checkpoint to keep."""
    candidate_steps: tuple[int, ...]
    """Evaluations not significantly worse than the best; the sweet spot is among them."""
    overfitting_from_step: int | None
    """The first evaluation after the best that is significantly worse than it; None when none was."""


def judge(evaluations: Mapping[int, Evaluation], *, kept: Collection[int] | None = None, seed: int = 0) -> Verdict:
    """Sweet spot and overfitting, by a paired bootstrap over the examples.

    Args:
        evaluations: by step.
        kept: steps whose checkpoint still stands; only these can be candidates. None: all. What was significantly
            worse than the best of its time, and so was not kept, can come close again to a later best that is spread
            more widely.
        seed: of the bootstrap.

    Paired: both checkpoints are judged on the same resampled examples, so that easy and hard ones cancel out.
    Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 16.4.

    Raises:
        ValueError: there is no evaluation, or no candidate was kept.
    """
    if not evaluations:
        raise ValueError("no evaluation to judge")
    ordered = [evaluations[step] for step in sorted(evaluations)]
    best = min(ordered, key=lambda evaluation: evaluation.loss)
    share_worse = _share_worse(np.stack([e.nll - best.nll for e in ordered], axis=1), seed)
    worse = {e.step: bool(share >= CONFIDENCE) for e, share in zip(ordered, share_worse, strict=True)}
    candidates = tuple(step for step, is_worse in worse.items() if not is_worse and (kept is None or step in kept))
    if not candidates:
        raise ValueError("none of the candidates was kept")
    return Verdict(
        best_step=best.step,
        sweet_spot_step=candidates[0],
        candidate_steps=candidates,
        overfitting_from_step=next((step for step in worse if step > best.step and worse[step]), None),
    )


def _share_worse(differences: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Share of the resamples in which each evaluation's loss is higher than the best's: [N, E] -> [E].

    Both losses have the same tokens in a resample, so the sign of the summed difference decides.
    """
    examples = len(differences)
    rng = np.random.Generator(np.random.PCG64(seed))
    positive = np.zeros(differences.shape[1])
    for _ in range(RESAMPLES):
        drawn = np.bincount(rng.integers(examples, size=examples), minlength=examples)
        positive += drawn @ differences > 0
    return positive / RESAMPLES


def is_exhausted(evaluations: Mapping[int, Evaluation], *, patience: int | None) -> bool:
    """Whether the last `patience` evaluations in a row brought no lower loss."""
    if patience is None or not evaluations:
        return False
    steps = sorted(evaluations)
    best = min(steps, key=lambda step: evaluations[step].loss)
    return len(steps) - 1 - steps.index(best) >= patience
