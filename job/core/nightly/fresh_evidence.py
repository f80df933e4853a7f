"""Test, then train: what records that neither model has seen say of a challenger, night after night, at any time.

Before a night trains on its new records, the model in use and the last challengers are judged on them. Each
challenger keeps an e-process: capital that starts at 1 and bets on it, record by record,

    e = mean over the bets b of  prod (1 + b x),        x = gain a token, clipped to [-1, 1], times min(1, T / full)

with x below or at 0 on average where the challenger is no better. Each product is then a supermartingale, and so is
their mean, so that by Ville's inequality P(e ever reaches 1 / level) <= level: it may be looked at each night, for as
long as one likes, and a challenger is promoted by it once e >= 1 / level. (Waudby-Smith & Ramdas 2024, "Estimating
means of bounded random variables by betting", JRSS B 86, 1-27, arXiv:2010.09686; the fixed mixture of bets is their
section on the discrete Kelly grid; Ramdas, Grünwald, Vovk & Shafer 2023, "Game-theoretic statistics and safe
anytime-valid inference", Statistical Science 38, 576-601, arXiv:2210.01948.) A product does not ask for the order of
its factors.

What it asks for: losses have no bound, so a record counts with at most 1 nat a token, and with at most the weight of
`full` tokens; what is tested is the mean of this. Records of one cluster make one bet a night. A cluster that comes
again on another night bets again, as if it were new.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from job.core.attempt.run_record import first_mistake
from job.core.judging.paired import Pairs
from job.core.section import NotNegative, Positive, Section, Text, Whole

EVIDENCE_VERSION: Literal[1] = 1
BETS = (0.05, 0.08, 0.12, 0.18, 0.27, 0.4, 0.6, 0.9)
"""Shares of the capital that are bet on a record: the best is the gain over its variance, 0.5 for 0.05 nat at 0.3."""
CLIPPED_NATS = 1.0
"""A record counts with no larger difference a token."""
WAITING = 3
"""Challengers that are judged on a night's records beside the champion; each costs as much as the champion."""
MOST_NIGHTS = 400
"""Nights that are remembered by name, so that none counts twice; a challenger waits no longer."""
_LARGEST_LOG = 1e6
"""Of a capital: beyond any level, and far from what a float holds."""

_Log = Annotated[float, Field(strict=True, ge=-_LARGEST_LOG, le=_LARGEST_LOG)]
_Logs = Annotated[tuple[_Log, ...], Field(min_length=len(BETS), max_length=len(BETS))]
_NOTHING_YET = (0.0,) * len(BETS)


class FreshEvidence(Section):
    """What fresh records say of a challenger beside a champion, as it stands in the store."""

    version: Literal[1] = EVIDENCE_VERSION
    challenger: Text
    """Its run."""
    champion: Text
    """The run it is compared with; another champion begins anew."""
    level: Annotated[float, Field(strict=True, ge=0, le=1)]
    """What the budget gave for it: the chance to be promoted by fresh records, were it no better."""
    full_tokens: Positive
    """A record with this many target tokens has its full weight, and no more beyond."""
    margin: NotNegative = 0.0
    """Nats a token by which it has to be better."""
    records: Whole = 0
    nights: Annotated[tuple[Text, ...], Field(max_length=MOST_NIGHTS)] = ()
    """Those that were counted, by what their records are known by."""
    better: _Logs = _NOTHING_YET
    """Logarithm of each bet's capital, where the challenger is bet on."""
    worse: _Logs = _NOTHING_YET
    """Where the champion is."""

    @model_validator(mode="after")
    def _counts_no_night_twice(self) -> Self:
        if len(set(self.nights)) != len(self.nights):
            raise ValueError("nights: one stands there twice")
        return self

    @property
    def e_better(self) -> float:
        """Evidence that the challenger is better: above 1 / level it is taken for better."""
        return _mean_of(self.better)

    @property
    def e_worse(self) -> float:
        """Evidence that it is worse."""
        return _mean_of(self.worse)

    @property
    def is_better(self) -> bool:
        """Whether the evidence is enough for the level that was paid."""
        return self.level > 0 and self.e_better >= 1 / self.level


def with_night(evidence: FreshEvidence, night: str, pairs: Pairs) -> FreshEvidence:
    """The evidence after a night's new records; a night that was counted changes nothing.

    Args:
        evidence: before.
        night: what these records are known by; the same ones must have the same name.
        pairs: the two models on them, before either was trained on any.

    Raises:
        ValueError: the challenger has waited for more nights than are kept.
    """
    if night in evidence.nights:
        return evidence
    if len(evidence.nights) == MOST_NIGHTS:
        raise ValueError(f"{evidence.challenger} has waited {MOST_NIGHTS} nights; let newer challengers take its place")
    difference, weight = pairs.sums()
    share = np.minimum(weight / evidence.full_tokens, 1.0)
    mean = difference / weight
    update = {
        "records": evidence.records + len(pairs.weight),
        "nights": (*evidence.nights, night),
        "better": _after(evidence.better, _clipped(-mean - evidence.margin) * share),
        "worse": _after(evidence.worse, _clipped(mean) * share),
    }
    return evidence.model_copy(update=update)


def worth_keeping(waiting: Sequence[FreshEvidence], *, most: int = WAITING) -> tuple[FreshEvidence, ...]:
    """Those of the challengers, newest last, that the next nights' records are to judge: with the most evidence.

    Each has its own level, so that leaving some out makes no other more likely to be wrong.
    """
    newest_first = list(reversed(waiting))
    return tuple(sorted(newest_first, key=lambda each: -each.e_better)[:most])


def log_capitals(gains: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Logarithm of the factor by which each bet's capital grows with these gains, [..., N] in [-1, 1]: [..., bets]."""
    return np.stack([np.log1p(bet * gains).sum(axis=-1) for bet in BETS], axis=-1)


def _clipped(gain: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(gain / CLIPPED_NATS, -1.0, 1.0)


def _after(logs: tuple[float, ...], gains: NDArray[np.float64]) -> tuple[float, ...]:
    grown = np.array(logs) + log_capitals(gains)
    return tuple(float(log) for log in np.clip(grown, -_LARGEST_LOG, _LARGEST_LOG))


def _mean_of(logs: tuple[float, ...]) -> float:
    highest = max(logs)
    if highest > math.log(1e300):
        return 1e300
    return sum(math.exp(log) for log in logs) / len(logs)


def read_fresh_evidence(content: dict[str, Any]) -> FreshEvidence:
    """The evidence that a JSON object is.

    Raises:
        ValueError: it is none, with the first value that is wrong.
    """
    try:
        return FreshEvidence.model_validate(content)
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from error
