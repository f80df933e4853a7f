"""What came of a run, in a sentence or two: for its page, its card and whoever follows it."""

from job.core.judging.verdict import NOTHING_BETTER
from job.core.reports.report import Report
from job.render.metric_text import by_chance


def verdict_text(report: Report) -> str:
    """The verdict with its uncertainty, and which step is kept."""
    spot, found = report.sweet_spot, report.held_out
    on = f"on {report.data.validation.used:,} held-out examples"
    if spot.step == 0:
        nothing = f"{NOTHING_BETTER[0].upper()}{NOTHING_BETTER[1:]} {on}: the adapter leaves it as it is."
        return f"{nothing}{_tried(report)}"
    by = f"by {spot.base_loss - spot.loss:.4g}"
    if found is not None and found.gain_plus_minus is not None:
        by = f"by {found.gain:.4g} ± {found.gain_plus_minus:.2g} (95 % interval)"
    learned = f"It learned: validation loss fell from {spot.base_loss:.4f} to {spot.loss:.4f} nats a token, {by} {on}."
    if found is not None and found.gain_plus_minus is not None and abs(found.gain) <= found.gain_plus_minus:
        learned = (
            f"Validation loss went from {spot.base_loss:.4f} to {spot.loss:.4f} nats a token, {by} {on}: that may be "
            "chance."
        )
    after = ""
    if spot.overfitting_from_step is not None:
        after = f" From step {spot.overfitting_from_step:,} on it was significantly worse: overfitting."
    return f"{learned} Step {spot.step:,} of {report.plan.steps:,} is kept: {spot.reason}.{after}"


def _tried(report: Report) -> str:
    """How much worse, or hardly better, the best of what was trained is."""
    found = report.tried
    if found is None:
        return ""
    loss = next(each.loss for each in report.evaluations if each.step == found.step)
    which = "lower" if found.gain > 0 else "higher"
    by, around = f"{abs(found.gain):.4g}", found.gain_plus_minus
    low, high = (None, None) if around is None else (found.gain - around, found.gain + around)
    sure = "" if around is None else f" ± {around:.2g} (95 % interval)"
    return (
        f" The best step that was trained, {found.step:,}, has a loss of {loss:.4f} nats a token, {which} by {by}{sure}"
        f"{by_chance(low, high)}."
    )
