"""What a report says of a night: promoted or not, by which numbers, out of which budget, on what new data."""

from collections.abc import Sequence
from dataclasses import dataclass

from job.core.attempt.ended import LONGEST_REASON, EndedPromotion
from job.core.attempt.run_record import RecordedParent
from job.core.nightly.channel import Judged, Outcome
from job.core.section import Flag, Section, Text, Whole

NAMED_FILES = 20
"""New files that are named, of all."""


class NewData(Section):
    """What there is to train on that the model in use was not trained on."""

    files: tuple[str, ...] = ()
    """URIs, at most 20 of them; a file that has changed is new."""
    file_count: Whole = 0
    bytes: Whole = 0
    """Of these files."""
    gone: Whole = 0
    """Files of the model in use that are no longer named."""
    records: Whole | None = None
    """Training examples that the model in use was not trained on; None: that is not known, as where it was put in use
    again after a long time."""
    unseen: Whole | None = None
    """Of these, those that no run of the channel was trained on, which judge older models tonight; None: that is not
    known, as after a change of the templates."""


class BudgetReport(Section):
    """The channel's error budget after tonight."""

    per_year: float
    """Wrong promotions that may be expected in any 365 days, at most."""
    spent_in_a_year: float
    """Of the last 365 days."""
    left: float
    """Saved for later nights, beside what they earn."""
    tests: Whole
    """Over the channel's life."""


class PromotionReport(Section):
    """What came of the run on its channel."""

    channel: Text
    channel_uri: Text
    outcome: Outcome
    said: Text
    """One sentence: promoted or not, and why."""
    replaced_by: Text | None = None
    """What is in use in its place, where it was put in use and replaced before this report was written, as by a
    rollback after its run was killed; None: it is in use, or was not promoted."""
    judged: Judged
    budget: BudgetReport
    new: NewData
    late: tuple[str, ...] = ()
    """Files that were left out because they were not whole yet, each with the reason."""
    parent: RecordedParent | None = None
    """The adapter that the run started from; None: the base."""
    fresh_promotion: str | None = None
    """A run that waited, and that tonight's new records put in use before this one was trained; None also where an
    attempt before the one that finished the run has found that."""
    also: tuple[str, ...] = ()
    """What came tonight, before this run was trained, of others that waited or had lost their swap: a sentence each."""
    conditional: Flag = True
    """Whether the store keeps conditions on writes; without them two that swap in the same two seconds may both think
    that they won, and one that stands still while it writes the state may undo what another has paid meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedOut:
    """A verdict, and what came of it."""

    judged: Judged
    outcome: Outcome
    replaced_by: str | None
    """As in the report."""

    @property
    def said(self) -> str:
        """The one sentence."""
        return said_of(self.judged, self.outcome, replaced_by=self.replaced_by)


def ended_with(done: CarriedOut, *, channel: str, also: Sequence[str]) -> EndedPromotion:
    """What is kept of it beside the report."""
    judged = done.judged
    return EndedPromotion(
        channel=channel,
        outcome=done.outcome,
        replaced_by=done.replaced_by,
        verdict=judged.decision.verdict,
        challenger=judged.run_id,
        champion=judged.decision.champion,
        why=done.said[:LONGEST_REASON],
        report=f"{judged.run_uri}/report.json",
        page=f"{judged.run_uri}/report.html",
        also=[each[:LONGEST_REASON] for each in also],
    )


def said_of(judged: Judged, outcome: Outcome, *, replaced_by: str | None = None) -> str:
    """The one sentence."""
    if replaced_by is not None:
        reason = judged.decision.reasons[0].removeprefix("Promoted: ")
        return f"Promoted, and no longer in use, since {replaced_by} was put in its place: {reason}"
    if outcome != "lost":
        return judged.decision.reasons[0]
    return (
        f"Not promoted: {judged.run_id} is better than {judged.decision.champion}, but that was no longer in use when "
        "it should be replaced; the run is judged again next night."
    )
