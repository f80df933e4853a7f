"""Test, then train: what records that neither model has seen say of a challenger, night after night, at any time.

Before a night trains on its new records, the model in use and the last challengers are judged on them. What the day was
about moves all of a night's records together, and one model more than the other, so that they are no independent
evidence: a night is one bet, however many records it has. Each challenger keeps an e-process, capital that starts at 1:

    e = mean over the bets b of  prod over nights (1 + b x),        x = clip(s (gain - margin) / c, -1, 1)

    gain   nats a token by which the challenger is better, over all target tokens of the night's new records
    s      sqrt(min(1, n / 200)), n = (sum T)^2 / sum T^2 of the records' target tokens T (Kish 1965, "Survey
           Sampling"): the mean of few records, or of few long ones, differs by chance, and counts less
    c      0.1 nat, or the largest s |gain| of the nights before where that is more

b is fixed, s and c are known before the night's losses are. Where x is at most 0 on average, given the nights before,
each product is a supermartingale, and so is their mean: by Ville's inequality P(e ever reaches 1 / level) <= level. It
may be looked at each night, for as long as one likes, and a challenger is promoted by it once e >= 1 / level (Shafer
2021, "Testing by betting", JRSS A 184, 407-431; Waudby-Smith & Ramdas 2024, "Estimating means of bounded random
variables by betting", JRSS B 86, 1-27, arXiv:2010.09686, with their grid of bets; Howard, Ramdas, McAuliffe & Sekhon
2021, "Time-uniform, nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49, 1055-1080,
arXiv:1810.08240).

What it asks for, of a challenger that is no better:

- its gain on a night is at most 0 on average (or the margin), whatever the nights before were and however many and long
  the night's records are. How the records of one night depend on each other does not matter. Nights that are alike do:
  a topic that stays for a week, or customers who come back the next day, make the next night's gain foreseeable;
- what is cut off beyond c weighs no more among its losses than among its gains. Cutting a gain off makes e smaller and
  is safe; cutting a loss off makes e larger. It does no harm where no night is worse by more than c, or where nights
  are symmetric around their mean. A challenger that is slightly better on most nights and far worse on a rare one may
  be taken for better before the rare one comes: no test of a mean is safe from that without a bound (Bahadur & Savage
  1956, "The nonexistence of certain statistical procedures in nonparametric problems", Annals of Mathematical
  Statistics 27, 1115-1122).

The price is time: a night multiplies the capital by 1.9 at most, which takes seventeen nights to reach 1 / level =
8420, that of a challenger of a night that saved, and nine for one of a night that had the most.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from job.core.attempt.run_record import first_mistake
from job.core.judging.paired import FEWEST, Pairs
from job.core.section import NotNegative, Section, Text, Whole

EVIDENCE_VERSION: Literal[2] = 2
_BETS_ON_RECORDS = 1
"""The version that took each record for a bet of its own."""
BETS = (0.1, 0.3, 0.6, 0.9)
"""Shares of the capital that are bet on a night."""
FULL_RECORDS = 200
"""Records of equal length from which on a night has its full weight."""
BOUND_NATS = 0.1
"""A night counts with no larger difference a token, unless an earlier one was larger."""
SIGN_ERRORS = 2.6
"""Standard errors by which a night's records speak for a challenger: by chance on one night in two hundred."""
WAITING = 3
"""Challengers that are judged on a night's records beside the champion; each costs as much as the champion."""
MOST_NIGHTS = 400
"""Nights that are remembered by name, so that none counts twice; a challenger waits no longer."""
_LARGEST_LOG = 1e6
"""Of a capital: beyond any level, and far from what a float holds."""

_Log = Annotated[float, Field(strict=True, ge=-_LARGEST_LOG, le=_LARGEST_LOG)]
_Logs = Annotated[tuple[_Log, ...], Field(min_length=len(BETS), max_length=len(BETS))]
_NOTHING_YET = (0.0,) * len(BETS)
_STAYS = "challenger", "champion", "level", "margin"
"""Of evidence that begins anew: who is judged, and what was paid for it."""


class FreshEvidence(Section):
    """What fresh records say of a challenger beside a champion, as it stands in the store."""

    version: Literal[2] = EVIDENCE_VERSION
    challenger: Text
    """Its run."""
    champion: Text
    """The run it is compared with; another champion begins anew."""
    level: Annotated[float, Field(strict=True, ge=0, le=1)]
    """What the budget gave for it: the chance to be promoted by fresh records, were it no better."""
    margin: NotNegative = 0.0
    """Nats a token by which it has to be better."""
    records: Whole = 0
    nights: Annotated[tuple[Text, ...], Field(max_length=MOST_NIGHTS)] = ()
    """Those that were counted, by what their records are known by."""
    largest: NotNegative = 0.0
    """Nats a token by which the models differed most on one of them, as far as it counted: it bounds the next night."""
    better: _Logs = _NOTHING_YET
    """Logarithm of each bet's capital, where the challenger is bet on."""
    worse: _Logs = _NOTHING_YET
    """Where the champion is."""
    last: float | None = None
    """By how many standard errors the last night's records had it worse than asked for (below 0: better), as if they
    were independent; None: they were too few. It decides nothing: it says which night's test is worth more."""

    @model_validator(mode="before")
    @classmethod
    def _bets_on_records_are_forgotten(cls, content: Any) -> Any:
        """Capital that was won as if records of a night were independent is worth nothing: what had it begins anew."""
        if isinstance(content, Mapping) and content.get("version") == _BETS_ON_RECORDS:
            return {name: content[name] for name in _STAYS if name in content}
        return content

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
    def speaks(self) -> bool:
        """Whether the last night's records speak for the challenger."""
        return self.last is not None and self.last <= -SIGN_ERRORS

    @property
    def is_better(self) -> bool:
        """Whether the evidence is enough for the level that was paid."""
        return self.level > 0 and self.e_better >= 1 / self.level


def with_night(evidence: FreshEvidence, night: str, pairs: Pairs) -> FreshEvidence:
    """The evidence after a night's new records; a night that was counted changes nothing.

    Args:
        evidence: before.
        night: what these records are known by; the same ones must have the same name.
        pairs: the two models on them, at least one, before either was trained on any. Clusters make no difference: a
            night is one bet anyway.

    Raises:
        ValueError: the challenger has waited for more nights than are kept.
    """
    if night in evidence.nights:
        return evidence
    if len(evidence.nights) == MOST_NIGHTS:
        raise ValueError(f"{evidence.challenger} has waited {MOST_NIGHTS} nights; let newer challengers take its place")
    share = float(night_share(pairs.weight))
    mean = float(pairs.difference.sum() / pairs.weight.sum())
    update = {
        "records": evidence.records + len(pairs.weight),
        "nights": (*evidence.nights, night),
        "largest": max(evidence.largest, share * abs(mean)),
        "better": _after(evidence.better, share * (-mean - evidence.margin), evidence.largest),
        "worse": _after(evidence.worse, share * mean, evidence.largest),
        "last": _last(pairs, evidence.margin),
    }
    return evidence.model_copy(update=update)


def worth_keeping(waiting: Sequence[FreshEvidence], *, most: int = WAITING) -> tuple[FreshEvidence, ...]:
    """Those of the challengers, newest last, that the next nights' records are to judge; first who has most evidence.

    They are the newest, which is most like those to come, and of the others who has most. Each has its own level, so
    that leaving some out makes no other more likely to be wrong.
    """
    newest_first = list(reversed(waiting))
    most_evidence = sorted(newest_first[1:], key=lambda each: -each.e_better)[: most - 1]
    return tuple(sorted([*newest_first[:1], *most_evidence], key=lambda each: -each.e_better))


def night_share(tokens: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """How much a night's difference counts, by the target tokens of its records, [..., N]: 0 to 1, [...]."""
    alike = tokens.sum(axis=-1) ** 2 / (tokens**2).sum(axis=-1)
    share: NDArray[np.floating[Any]] = np.sqrt(np.minimum(alike / FULL_RECORDS, 1.0))
    return share


def errors_of(
    difference: NDArray[np.floating[Any]], tokens: NDArray[np.floating[Any]], margin: float = 0.0
) -> NDArray[np.floating[Any]]:
    """By how many standard errors a challenger is worse than asked for, were a night's records independent: [...].

    Args:
        difference: of each record, nats of all its target tokens, the challenger's less the champion's: [..., N].
        tokens: of each record: [..., N].
        margin: nats a token by which it has to be better.
    """
    records, weight = difference.shape[-1], tokens.sum(axis=-1)
    mean = difference.sum(axis=-1) / weight
    squares = ((difference - mean[..., None] * tokens) ** 2).sum(axis=-1)
    error: NDArray[np.floating[Any]] = np.sqrt(squares * records / (records - 1)) / weight
    with np.errstate(divide="ignore", invalid="ignore"):
        errors: NDArray[np.floating[Any]] = (mean + margin) / error
    return errors


def log_growth(
    gain: NDArray[np.floating[Any]] | float, largest: NDArray[np.floating[Any]] | float
) -> NDArray[np.floating[Any]]:
    """Logarithm of the factor by which each bet's capital grows on a night: [..., bets].

    Args:
        gain: of the night, as far as it counts: [...].
        largest: difference of an earlier night, either way; 0 before the first: [...].
    """
    bounded = np.clip(gain / np.maximum(largest, BOUND_NATS), -1.0, 1.0)
    return np.log1p(np.multiply.outer(bounded, BETS))


def _after(logs: tuple[float, ...], gain: float, largest: float) -> tuple[float, ...]:
    grown = np.array(logs) + log_growth(gain, largest)
    return tuple(float(log) for log in np.clip(grown, -_LARGEST_LOG, _LARGEST_LOG))


def _last(pairs: Pairs, margin: float) -> float | None:
    if len(pairs.weight) < FEWEST:
        return None
    errors = float(errors_of(pairs.difference, pairs.weight, margin))
    return errors if math.isfinite(errors) else None


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
