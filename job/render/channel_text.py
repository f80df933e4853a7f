"""A channel as plain text: what is in use and why, the last nights, the budget; and what a report says of its night."""

from collections.abc import Sequence
from datetime import date

from job.core.judging.paired import Gap
from job.core.nightly.channel import ChannelState, Night, Promoted, name_in_use, waiting_for
from job.core.nightly.error_budget import YEAR_DAYS
from job.core.nightly.promotion_report import PromotionReport

_NIGHTS = 14
_CHANGES = 10
"""Shown, the newest first."""
_NAMED = 3


def promotion_lines(promotion: PromotionReport | None) -> list[str]:
    """What a report's reader wants to know first: promoted or not, and why."""
    if promotion is None:
        return []
    judged, new, budget = promotion.judged, promotion.new, promotion.budget
    lines = [f"channel            {promotion.channel}: {promotion.said}"]
    lines += [f"                   {reason}" for reason in judged.decision.reasons[1:]]
    lines += [f"                   {note}" for note in judged.decision.notes]
    guarded = {f"slice {name}": gap for name, gap in judged.slices.items()}
    if judged.regression is not None:
        guarded["regression set"] = judged.regression
    guarded |= {f"against {name}": gap for name, gap in judged.drift.items()}
    lines += [f"  {name:<16} {_gap(gap)}" for name, gap in guarded.items()]
    if judged.answers is not None:
        lines.append(f"  {'answers':<16} {_answers(judged.answers)}")
    named = ", ".join(new.files[:_NAMED]) + (f" and {new.file_count - _NAMED} more" if new.file_count > _NAMED else "")
    records = "" if new.records is None else f", {new.records:,} examples that the model in use has not seen"
    records += "" if new.unseen is None else f", {new.unseen:,} that no run of the channel has"
    lines.append(f"new data           {new.file_count} files, {new.bytes:,} bytes{records}: {named or 'none'}")
    if promotion.parent is not None:
        lines.append(f"started from       {promotion.parent.run_id}")
    if promotion.fresh_promotion is not None:
        lines.append(f"before training    {promotion.fresh_promotion} was promoted by tonight's new records")
    lines += [f"others             {each}" for each in promotion.also]
    lines += [f"left out           {late}" for late in promotion.late]
    lines.append(
        f"error budget       {budget.spent_in_a_year:.3f} of {budget.per_year:g} wrong promotions spent in {YEAR_DAYS} "
        f"days, {budget.left:.4f} saved"
    )
    return [*lines, ""]


def channel_lines(
    uri: str, changes: Sequence[Promoted], state: ChannelState | None, *, today: int, is_current: bool
) -> list[str]:
    """What is in use, why, and how it came to be.

    Args:
        uri: of the channel.
        changes: of what is in use, newest first.
        state: None: the channel has none.
        today: as the budget counts days.
        is_current: whether the channel's copy of the adapter is that in use.
    """
    now = changes[0] if changes else None
    lines = [f"channel {uri}", "", *_in_use(now, uri, is_current=is_current)]
    if state is not None:
        lines += ["", *_budget(state, today), *_took(state.nights), *_waiting(state, name_in_use(now)), ""]
        lines += _trend(state.nights)
        lines += _fresh(state)
    if len(changes) > 1:
        lines += ["", "changes, the newest first"]
        lines += [f"{each.sequence:>5}  {each.since:<25}  {each.why}" for each in changes[:_CHANGES]]
    return lines


def _in_use(now: Promoted | None, uri: str, *, is_current: bool) -> list[str]:
    if now is None:
        return ["in use    the base: nothing was promoted yet"]
    lines = [f"in use    {name_in_use(now)}, since {now.since}", f"why       {now.why}"]
    if now.adapter is not None:
        lines.append(f"adapter   {now.adapter.uri}")
        stands = uri + "/adapter" if is_current else "being brought up to date; the next `run` does it"
        lines.append(f"copy      {stands}")
    if now.replaced is not None or now.sequence > 1:
        lines.append(f"before    {now.replaced or 'the base'}; --rollback goes back to it")
    return lines


def _budget(state: ChannelState, today: int) -> list[str]:
    budget = state.budget
    spent = budget.spent_since(today - YEAR_DAYS + 1)
    last = date.fromordinal(budget.day).isoformat()
    return [
        f"budget    {spent:.3f} of {budget.per_year:g} wrong promotions that a year may expect are spent",
        f"          {budget.left:.4f} is saved; {budget.tests} tests, the last on {last}",
    ]


def _took(nights: Sequence[Night]) -> list[str]:
    """GPU hours of the nights that trained, and how many of them were training steps."""
    works = [night.work for night in nights if night.work is not None]
    held = sum(work.held_seconds * work.ranks for work in works)
    trained = sum(work.train_seconds * work.ranks for work in works)
    if not held:
        return []
    goodput = f", {trained / held:.0%} of them in training steps (goodput)" if trained <= held else ""
    return [f"took      {held / 3600:,.2f} GPU hours in {len(works):,} nights that trained{goodput}"]


def _waiting(state: ChannelState, champion: str) -> list[str]:
    lines = [
        f"waits     {each.challenger}: {each.records:,} fresh records in {len(each.nights)} nights, evidence "
        f"{each.e_better:.3g}" + (f", {1 / each.level:,.0f} is enough" if each.level else "")
        for each in waiting_for(state, champion)
    ]
    return lines + [f"again     {run_id} lost its swap, and is judged again next night" for run_id in state.again]


def _trend(nights: Sequence[Night]) -> list[str]:
    if not nights:
        return []
    lines = ["nights, the newest first", f"{'night':<25}  {'run':<24} {'loss':>8} {'in use':>8}  outcome"]
    for night in list(reversed(nights))[:_NIGHTS]:
        outcome = night.outcome if night.outcome != "refused" else night.verdict
        lines.append(
            f"{night.time:<25}  {night.run_id:<24} {night.challenger_loss:>8.4f} {night.champion_loss:>8.4f}  {outcome}"
        )
    return lines


def _fresh(state: ChannelState) -> list[str]:
    if not state.fresh:
        return []
    lines = ["", "new records before any run was trained on them, the newest first"]
    for night in list(reversed(state.fresh))[:_NIGHTS]:
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in night.losses.items())
        lines.append(f"{night.time:<25}  {night.records:,} records: {losses}")
    return lines


def _answers(gap: Gap) -> str:
    interval = "" if gap.low is None or gap.high is None else f" ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
    return f"{100 * gap.mean:+.1f}{interval} points of wrong answers on {gap.examples} examples"


def _gap(gap: Gap) -> str:
    interval = "" if gap.low is None or gap.high is None else f" ({gap.low:+.4f} to {gap.high:+.4f})"
    return f"{gap.mean:+.4f}{interval} nat a token on {gap.examples} examples"
