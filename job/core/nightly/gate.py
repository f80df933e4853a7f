"""May tonight's model replace the one in use? All evidence of a night in, one decision with its reasons out.

A challenger is promoted when it is *better* by one of two tests, which share the level that the error budget gave for
it (`error_budget`), so that both together are wrong with at most that chance: by the frozen examples on its own night
(`paired`), or by fresh records on a later one (`fresh_evidence`). And when nothing that is guarded speaks against it:

- a guarded slice, or the share of right answers, that got significantly worse; over all of them the chance to hold up a
  model that is nowhere worse is 5 % (Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian
  Journal of Statistics 6, 65-70);
- the regression set, against the champion, the champion of 30 days ago (on a younger channel the first one) and the
  base: significantly worse at 5 %, or measured worse by more than `max_drift`. A step down that no night can see adds
  up, and the sum is seen. No model that was rolled back from is among them;
- fresh records that say the opposite, and, where fresh records are what promotes, the frozen examples that do: at 5 %.

Each comparison on the regression set is at 5 % by itself, and what is measured has no level: a challenger that is as
good as all three there is held up by their significance with a chance of at most 15 % (less, for all three look at the
same losses of it), by that of all guards together of at most 20 % on its own night and 30 % where fresh records
promote. That is accepted: a night that waits costs little, and a step down that Holm had let pass would stay.

Guards are not paid from the error budget: they only ever refuse. What no number here holds: what the frozen examples
are not like, and the luck of a seed. Where two were trained both have to be better, each at the whole level, so that
both together are wrong no more often; their figures are said, and no interval is made of them: two have one degree of
freedom, by which its ends would lie 12.7 standard errors out.

The frozen examples also chose the challenger's checkpoint, and the best of several looks better on them than it is; the
champion has no such choice tonight, least of all where the training started from it or where it is the base. So each
checkpoint that could have been chosen has an equal part of the level (Bonferroni): a checkpoint that is no better is
promoted only if one of them is significant at its part, by whatever rule it is chosen and however much they resemble
each other, and the chance of that is at most the level. What it asks for is that the bootstrap's p-values are right for
each, and that their number was fixed before: so it is the number that the recipe plans, also of a training that lost
its patience earlier. Ten checkpoints raise the
smallest gain that an ordinary night sees by 17 %, a hundred by 31 %; to choose by one half of the examples and to
judge by the other would raise it by 41 %. What a champion had of the same choice on its own night, and of having passed
this gate, stays in its results on the same examples and is in its favour: the test then promotes less often than its
level says. Guards on the frozen examples are the weaker for the choice; those on the regression set
and on fresh records, which chose nothing, are not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from job.core.judging.paired import FEWEST, SMALLEST_P, Gap
from job.core.nightly.fresh_evidence import FreshEvidence
from job.core.section import Flag, Section

GUARD_LEVEL = 0.05
"""Chance that a challenger that is no worse is held up by slices and answers together, or by any other guard alone."""
MAX_DRIFT = 0.02
"""Nats a token on the regression set that may be lost, as measured, where the recipe says nothing else."""
FRESH_SHARE = 0.2
"""Of a challenger's level: for fresh records on later nights; the rest is for the frozen examples on its own."""

Verdict = Literal["better", "not better", "cannot tell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is known of a challenger beside the champion."""

    challenger: str
    champion: str
    """The model in use, or the base where there is none yet."""
    level: float
    """Of tonight's test on the frozen examples; 0 for a challenger that had its test and waits for fresh records."""
    gap: Gap
    """On the frozen examples."""
    checkpoints: int = 1
    """Of which these examples chose the challenger; each has its part of the level."""
    slices: Mapping[str, Gap] = field(default_factory=dict)
    """The guarded ones."""
    answers: Gap | None = None
    """Wrong answers in place of nats; None: answers are not judged."""
    regression: Gap | None = None
    """On the regression set, against the champion; None: there is none."""
    drift: Mapping[str, Gap] = field(default_factory=dict)
    """On the regression set, or on the frozen examples where there is none, against earlier models, by what they are
    called in a sentence: "the champion of 30 days ago", "the base"."""
    fresh: FreshEvidence | None = None
    """None: no records have come that neither model has seen."""
    max_drift: float = MAX_DRIFT
    seeds: tuple[Gap, ...] = ()
    """Of each training on the frozen examples, where there were several; `gap` is the one of them that decides."""


class Decision(Section):
    """What was decided, and why."""

    promoted: Flag
    verdict: Verdict
    challenger: str
    champion: str
    level: float
    reasons: tuple[str, ...]
    """Sentences; the first says it all in one."""
    held_up_by: tuple[str, ...] = ()
    """Guards that speak against it."""
    notes: tuple[str, ...] = ()
    """What a reader should know of the numbers."""


def shares_of(level: float) -> tuple[float, float]:
    """What of a challenger's level is for the frozen examples, and what for fresh records."""
    return level * (1 - FRESH_SHARE), level * FRESH_SHARE


def level_of_each(level: float, checkpoints: int) -> float:
    """A checkpoint's part of a level, so that the chance that any of them is wrongly called better is the level."""
    return level / checkpoints


def verdict_of(gap: Gap, level: float) -> Verdict:
    """What the frozen examples say at this level."""
    if gap.identical:
        return "not better"
    if gap.p_better <= level:
        return "better"
    # Even at its best it would not be better by what is asked for.
    return "not better" if gap.low is not None and gap.low > -gap.margin else "cannot tell"


def holm(p_values: Mapping[str, float], level: float = GUARD_LEVEL) -> tuple[str, ...]:
    """Those that are significant together: with this chance or less, one of them is not."""
    significant = []
    for place, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        if p_values[name] > level / (len(p_values) - place):
            break
        significant.append(name)
    return tuple(significant)


def decide(evidence: Evidence) -> Decision:
    """Whether the challenger replaces the champion.

    Raises:
        ValueError: the fresh records judged two other models.
    """
    fresh = evidence.fresh
    if fresh is not None and (fresh.challenger, fresh.champion) != (evidence.challenger, evidence.champion):
        raise ValueError(f"fresh records of {fresh.challenger} against {fresh.champion} are none of this comparison")
    frozen = verdict_of(evidence.gap, level_of_each(evidence.level, evidence.checkpoints))
    by_fresh = frozen != "better" and fresh is not None and fresh.is_better and not evidence.gap.identical
    verdict: Verdict = "better" if by_fresh else frozen
    against = _guards(evidence, by_fresh=by_fresh)
    promoted = verdict == "better" and not against
    found = _by_fresh(evidence) if by_fresh else _by_frozen(evidence, frozen)
    if promoted:
        first = f"Promoted: {found}."
    elif verdict == "better":
        first = f"Not promoted: {found}; but {'; '.join(against.values())}."
    else:
        first = f"Not promoted, {verdict}: {found}."
    more = [f"{said[0].upper()}{said[1:]}." for said in against.values()] if verdict != "better" else []
    return Decision(
        promoted=promoted,
        verdict=verdict,
        challenger=evidence.challenger,
        champion=evidence.champion,
        level=evidence.level,
        reasons=(first, *_outlook(evidence, verdict), *more),
        held_up_by=tuple(against),
        notes=_notes(evidence),
    )


def _guards(evidence: Evidence, *, by_fresh: bool) -> dict[str, str]:
    """Those that speak against the challenger, each with what it says."""
    against = {}
    guarded = {f"slice {name}": gap for name, gap in evidence.slices.items()}
    if evidence.answers is not None:
        guarded["answers"] = evidence.answers
    # What has too few examples makes no test, and so takes nothing from the others' level.
    seen = {name: gap.p_worse for name, gap in guarded.items() if gap.standard_error is not None}
    for name in holm(seen):
        gap = guarded[name]
        loss = f"{100 * gap.mean:.1f} % more wrong answers" if name == "answers" else f"{gap.mean:.4f} nat a token"
        against[name] = f"{name}: got significantly worse, by {loss} on {_examples(gap)} (p = {gap.p_worse:.2g})"
    if evidence.regression is not None and _is_down(evidence.regression, evidence.max_drift):
        against["regression set"] = f"the regression set: {_distance(evidence.regression, evidence.champion)}"
    for earlier, gap in evidence.drift.items():
        if _is_down(gap, evidence.max_drift):
            against[f"drift against {earlier}"] = f"drift: {_distance(gap, earlier)}"
    fresh = evidence.fresh
    if fresh is not None and fresh.e_worse >= 1 / GUARD_LEVEL:
        against["fresh records"] = (
            f"on {_number(fresh.records)} fresh records it is worse than {evidence.champion} "
            f"(evidence {_number(fresh.e_worse)}, {_number(1 / GUARD_LEVEL)} is enough)"
        )
    if by_fresh and evidence.gap.p_worse <= GUARD_LEVEL:
        against["frozen examples"] = f"the frozen examples: {_distance(evidence.gap, evidence.champion)}"
    return against


def _is_down(gap: Gap, most: float) -> bool:
    return gap.p_worse <= GUARD_LEVEL or gap.mean > most


def _by_frozen(evidence: Evidence, verdict: Verdict) -> str:
    gap = evidence.gap
    if gap.identical:
        return f"{evidence.challenger} gives the same as {evidence.champion} on {_examples(gap)}"
    asked = f", and has to be better by {gap.margin:.4f}" if gap.margin > 2 * _PRINTED else ""
    sure = f"; p = {gap.p_better:.2g}, tonight's level is {_level(evidence)}" if verdict == "better" else ""
    return f"{evidence.challenger} is {_distance(gap, evidence.champion)}{asked}{sure}"


def _by_fresh(evidence: Evidence) -> str:
    fresh = evidence.fresh
    assert fresh is not None
    return (
        f"{evidence.challenger} is better than {evidence.champion} on {_number(fresh.records)} records of "
        f"{len(fresh.nights)} nights that neither had seen (evidence {_number(fresh.e_better)}, "
        f"{_number(1 / fresh.level)} is enough)"
    )


def _outlook(evidence: Evidence, verdict: Verdict) -> list[str]:
    """What would make an undecided comparison a decided one."""
    gap, fresh = evidence.gap, evidence.fresh
    level = level_of_each(evidence.level, evidence.checkpoints)
    if verdict != "cannot tell":
        return []
    if level == 0 or fresh is not None:
        return [_waiting(fresh)] if fresh is not None else []
    if level < SMALLEST_P:
        left = f"level {_level(evidence)}"
        return [f"The error budget has too little left for a test tonight ({left}); it fills up day by day."]
    smallest = gap.smallest_seen(level)
    if smallest is None:
        return [f"{_examples(gap)} are too few for a test: {FEWEST} independent ones are needed."]
    seen = f"{_examples(gap)} see a gain of {smallest:.4f} nat a token or more at tonight's level"
    return [f"{seen}; {_what_more_would_do(gap, level)}."]


def _what_more_would_do(gap: Gap, level: float) -> str:
    more = gap.more_examples(level)
    if more:
        return f"about {_number(more)} more would show the measured gain"
    if more == 0:
        # The spread says that they see it, and the resamples do not: the tail is longer than the spread says.
        return "the measured gain is that large, but rests on too few of them to be sure"
    if gap.mean >= 0:
        return "none was measured that more of them would show"
    if -gap.mean <= gap.margin:
        return f"the measured gain is no more than the {gap.margin:.4f} that are asked for, however many there were"
    return "the measured gain is too small for any number of them to show"


def _waiting(fresh: FreshEvidence) -> str:
    enough = f"{_number(1 / fresh.level)} is enough" if fresh.level else "none would be enough: nothing was paid for it"
    return f"{_number(fresh.records)} fresh records so far: evidence {_number(fresh.e_better)}, {enough}."


def _level(evidence: Evidence) -> str:
    each = level_of_each(evidence.level, evidence.checkpoints)
    more = f", {each:.2g} for each of {_number(evidence.checkpoints)} checkpoints" if evidence.checkpoints > 1 else ""
    return f"{evidence.level:.2g}{more}"


def _notes(evidence: Evidence) -> tuple[str, ...]:
    notes = []
    if evidence.seeds:
        found = " and ".join(f"{abs(each.mean):.4f} {_side(each.mean)}" for each in evidence.seeds)
        notes.append(
            f"Two seeds were trained: {found}, in nats a token. The interval is that of the one that "
            "is less surely better, which decided; it does not hold how far seeds differ."
        )
    else:
        notes.append("Another seed would have trained another model: the interval does not hold how far such differ.")
    if evidence.checkpoints > 1:
        notes.append(
            f"Its checkpoint is the one of {_number(evidence.checkpoints)} that the frozen examples chose: the level "
            "is shared out among them, and the interval does not hold that choice, by which it looks better than it is."
        )
    guarded = dict(evidence.slices) | ({"answers": evidence.answers} if evidence.answers is not None else {})
    few = [name for name, gap in guarded.items() if gap.clusters < FEWEST]
    if few:
        notes.append(f"Not guarded, because fewer than {FEWEST} independent examples: {', '.join(few)}.")
    if evidence.regression is not None and evidence.regression.clusters < FEWEST:
        notes.append(
            f"The regression set has fewer than {FEWEST} independent examples: it holds a run up by what is measured "
            "alone."
        )
    return tuple(notes)


_PRINTED = 1e-4
"""The last place of a printed difference."""
_WRITTEN_OUT = 1e6
"""From here on numbers are printed by their power of ten."""


def _distance(gap: Gap, than: str) -> str:
    """`0.0512 nat a token better than run-1 on 500 examples (95 % interval 0.0240 to 0.0780 better)`."""
    said = f"{abs(gap.mean):.4f} nat a token {_side(gap.mean)} than {than} on {_examples(gap)}"
    if gap.low is None or gap.high is None:
        return said
    ends = sorted((gap.low, gap.high), key=abs)
    if gap.low * gap.high >= 0:
        return f"{said} (95 % interval {abs(ends[0]):.4f} to {abs(ends[1]):.4f} {_side(ends[1])})"
    return f"{said} (95 % interval {-gap.low:.4f} better to {gap.high:.4f} worse)"


def _side(mean: float) -> str:
    return "worse" if mean > 0 else "better"


def _examples(gap: Gap) -> str:
    clusters = "" if gap.clusters == gap.examples else f" in {_number(gap.clusters)} clusters"
    return f"{_number(gap.examples)} example{'' if gap.examples == 1 else 's'}{clusters}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value < _WRITTEN_OUT else f"{value:.1e}"
