"""What came of a run, in a sentence or two: for its page, its card and whoever follows it."""

from job.core.judging.verdict import NOTHING_BETTER
from job.core.reports.report import Report


def verdict_text(report: Report) -> str:
    """The verdict with its uncertainty, and which step is kept."""
    spot, found = report.sweet_spot, report.held_out
    on = f"on {report.data.validation.used:,} held-out examples"
    if spot.step == 0:
        return f"{NOTHING_BETTER[0].upper()}{NOTHING_BETTER[1:]} {on}: the adapter leaves it as it is."
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
