"""From what models made of the same examples to a verdict on one of them, with all its numbers; nothing is loaded."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from job.core.judging.paired import Gap, gap_at, gap_of, gaps_of
from job.core.nightly.channel import AdapterInUse, Compared, Judged, OtherTraining
from job.core.nightly.exam_results import Exam, ExampleResults, answer_pairs_on, loss_of, pairs_on
from job.core.nightly.fresh_evidence import FreshEvidence
from job.core.nightly.gate import GUARD_LEVEL, Evidence, decide, level_of_each, shares_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Models on one exam."""

    exam: Exam
    challenger: ExampleResults
    champion: ExampleResults
    seeds: tuple[ExampleResults, ...] = ()
    """Of other trainings of the challenger's recipe."""
    earlier: Mapping[str, ExampleResults] = field(default_factory=dict)
    """Of models that the challenger must not lie below, by what sentences call them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standards:
    """What the recipe asks of a challenger."""

    min_improvement: float
    max_drift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Against what, and by what, a run is judged."""

    champion: str
    """What sentences call the model in use."""
    compared: Compared
    """Its entry."""
    standards: Standards
    level: float
    """What the budget gave for the run. Half of it is for the frozen examples, all of it where two seeds were trained,
    since such a run does not wait for fresh records; of one that waited, and had its test, none."""
    fresh: FreshEvidence | None = None
    """What they say; None: it did not wait."""
    time: str
    day: int
    """Of the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The run that is judged."""

    run_id: str
    run_uri: str
    round: int
    """1; more where it is judged again."""
    adapter: AdapterInUse
    base: str
    revision: str
    others: tuple[OtherTraining, ...] = ()
    """Of the same recipe, by other seeds, whose results are the `seeds` of what was answered."""
    checkpoints: int = 1
    """Of which the frozen examples chose the one that is judged: as many as were planned. Of another seed, too."""


def judge_run(candidate: Candidate, frozen: Answered, regression: Answered | None, terms: Terms) -> Judged:
    """The verdict on a run.

    Args:
        candidate: the run.
        frozen: its results and its champion's on the frozen examples.
        regression: the same on the regression set; None: there is none.
        terms: against what, and by what.
    """
    standards, fresh = terms.standards, terms.fresh
    seed, level = _seed_of(candidate), _frozen_level(candidate, terms)
    pairs = pairs_on(frozen.exam, frozen.challenger, frozen.champion)
    each = level_of_each(level, candidate.checkpoints)
    gaps = [
        gap_at(by_seed, each, min_improvement=standards.min_improvement, seed=seed)
        for by_seed in (pairs, *(pairs_on(frozen.exam, other, frozen.champion) for other in frozen.seeds))
    ]
    gap = max(gaps, key=lambda each: (each.p_better, each.mean))
    answers = answer_pairs_on(frozen.exam, frozen.challenger, frozen.champion)
    slices = frozen.exam.slice_masks()
    strictest = GUARD_LEVEL / (len(slices) + 1)  # Holm's first, with the answers
    evidence = Evidence(
        challenger=candidate.run_id,
        champion=terms.champion,
        level=level,
        gap=gap,
        checkpoints=candidate.checkpoints,
        slices=gaps_of(pairs, slices, strictest, seed=seed),
        answers=None if answers is None else _of_shares(gap_of(answers, seed=seed)),
        regression=None if regression is None else _on(regression, regression.champion, seed=seed),
        drift=_drift(regression or frozen, seed=seed),
        fresh=fresh,
        max_drift=standards.max_drift,
        seeds=tuple(gaps) if len(gaps) > 1 else (),
    )
    return Judged(
        run_id=candidate.run_id,
        run_uri=candidate.run_uri,
        round=candidate.round,
        time=terms.time,
        day=terms.day,
        compared=terms.compared,
        decision=decide(evidence),
        level=terms.level,
        challenger_loss=loss_of(frozen.exam, frozen.challenger),
        champion_loss=loss_of(frozen.exam, frozen.champion),
        gap=gap,
        slices=dict(evidence.slices),
        answers=evidence.answers,
        regression=evidence.regression,
        drift=dict(evidence.drift),
        fresh=fresh,
        seeds=evidence.seeds,
        others=candidate.others,
        checkpoints=candidate.checkpoints,
        exam=frozen.exam.name,
        regression_exam=None if regression is None else regression.exam.name,
        how=frozen.challenger.how,
        adapter=candidate.adapter,
        base=candidate.base,
        revision=candidate.revision,
    )


def evidence_to_gather(judged: Judged, standards: Standards, *, level: float) -> FreshEvidence | None:
    """What later nights' fresh records are to be gathered in, for a run that was not promoted; None: it is no other."""
    if judged.gap.identical or judged.decision.promoted or judged.others:
        return None  # fresh records would speak for one of two trainings, and both have to be better
    return FreshEvidence(
        challenger=judged.run_id,
        champion=judged.decision.champion,
        level=shares_of(level)[1],
        margin=standards.min_improvement,
    )


def _frozen_level(candidate: Candidate, terms: Terms) -> float:
    if terms.fresh is not None:
        return 0.0
    return terms.level if candidate.others else shares_of(terms.level)[0]


def _drift(answered: Answered, *, seed: int) -> dict[str, Gap]:
    return {name: _on(answered, results, seed=seed) for name, results in answered.earlier.items()}


def _on(answered: Answered, other: ExampleResults, *, seed: int) -> Gap:
    return gap_of(pairs_on(answered.exam, answered.challenger, other), seed=seed)


def _of_shares(gap: Gap) -> Gap:
    """No share differs from another by more than 1, however few examples an interval is made of."""
    if gap.low is None or gap.high is None:
        return gap
    return gap.model_copy(update={"low": max(-1.0, gap.low), "high": min(1.0, gap.high)})


def _seed_of(candidate: Candidate) -> int:
    """Of the bootstrap: a verdict that is made again is the same."""
    named = f"{candidate.run_id}/{candidate.round}".encode()
    return int.from_bytes(hashlib.sha256(named).digest()[:4], "big")
