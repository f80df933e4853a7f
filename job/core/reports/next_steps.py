"""What to do after a run, read off its report: each rule is a sentence with its figures, or says nothing."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from job.core.reports.report import Report, SourceLoss

_EARLY, _VERY_EARLY = 0.5, 0.25
"""Of the run: from a best step before it on, what came after made nothing better."""
_FELL = 0.01
"""Of the loss: a fall between two evaluations that is less is none."""
_SLOWEST = 0.9
"""The share of one evaluation's fall that the next one keeps, at most: beyond it no end could be foreseen."""
_NOTHING = 1e-9
_CUT = 0.01
_MOST_DEARER = 1.5
"""A longer max_length that costs more times as much is a decision, no advice."""
_RIGHT = 0.5
_A_DEGREE = "rouge_l"
"""The metric of which half a score is not half of the answers."""
_REPEATED = 0.05
_FEW = 50
_WORSE, _LEARNED = 1.01, 0.99
"""Of the base's loss: above, a source has become worse; below, it was learned."""
_MOST_EVALUATION = 0.25
_USEFUL = 0.7
_MANY_OUTLIERS = 3
"""Named files and lines in a sentence."""


def next_steps(report: Report) -> list[str]:
    """What to do next, what matters most first; empty: nothing was seen."""
    return [step for rule in _RULES if (step := rule(report)) is not None]


def _shared_examples(report: Report) -> str | None:
    data = report.data
    if not data.overlap:
        return None
    return (
        f"{data.overlap:,} of the {data.validation.used:,} held-out examples are also trained on, so their loss "
        "flatters: take them out of one side"
    )


def _nothing_better(report: Report) -> str | None:
    spot, later = report.sweet_spot, report.evaluations[1:]
    if spot.step != 0 or not later:
        return None
    rate = _number(report, "train", "learning_rate")
    lower = "lower train.learning_rate" if rate is None else f"try train.learning_rate {rate / 10:g} (it was {rate:g})"
    # An earlier version of the job kept no example's loss of such a run.
    look = "look at the training examples (`preview`)" if report.tried is None else "look at each example's change"
    if all(each.loss > spot.base_loss for each in later):
        return f"the loss has risen from the first evaluation on: {lower}, and {look}"
    return f"nothing was learned beyond chance: {look}, train longer, or raise train.learning_rate"


def _still_falling(report: Report) -> str | None:
    """By the falls between the last three evaluations, taken to shrink as they did."""
    spot, judged = report.sweet_spot, report.evaluations
    if len(judged) < 3 or spot.stopped_early or not spot.step == spot.best_step == judged[-1].step:  # noqa: PLR2004
        return None
    before, middle, last = judged[-3:]
    gap, fell, fell_before = last.step - middle.step, middle.loss - last.loss, before.loss - middle.loss
    if gap < 1 or middle.step <= before.step or fell <= _FELL * last.loss:
        return None
    a_step, a_step_before = fell / gap, fell_before / (middle.step - before.step)
    kept = _SLOWEST if a_step_before <= 0 else min(a_step / a_step_before, _SLOWEST)
    more = math.ceil(math.log(max(_FELL * last.loss / fell, _NOTHING)) / math.log(kept))
    steps = _round(min(more * gap, last.step))
    return (
        f"still falling at the end, by {fell:.2g} over the last {gap:,} steps: about {steps:,} more steps, so "
        f"{_length(report, (last.step + steps) / max(1, report.plan.steps))}"
    )


def _best_early(report: Report) -> str | None:
    spot, steps = report.sweet_spot, report.plan.steps
    share = spot.best_step / max(1, steps)
    if spot.overfitting_from_step is None or spot.step == 0 or share > _EARLY:
        return None
    half = _EARLY if share > _VERY_EARLY else _VERY_EARLY
    return (
        f"best at {share:.0%} of the run (step {spot.best_step:,} of {steps:,}) and significantly worse from step "
        f"{spot.overfitting_from_step:,} on: {_length(report, half)}, or more data"
    )


def _cut_targets(report: Report) -> str | None:
    """What is learned and was cut, in target tokens; in examples where they are dropped, or nobody counted."""
    data, chosen = report.data, report.data.max_length
    rows = max(1, data.train.rows)
    now = next((each for each in data.candidates if each.tokens == chosen), None)
    if now is None or now.share_cut >= 1:
        return None
    counted = now.targets_cut is not None and not data.train.dropped
    cut = now.targets_cut if counted else (data.train.truncated + data.train.dropped) / rows
    if cut is None or cut <= _CUT:
        return None
    for longer in data.candidates:
        left = longer.targets_cut if counted else longer.examples_over / rows
        dearer, what = (1 - longer.share_cut) / (1 - now.share_cut), "tokens"
        if now.work is not None and longer.work is not None and now.work > 0:
            dearer, what = longer.work / now.work, "time"
        if longer.tokens <= chosen or left is None or left > _CUT or dearer > _MOST_DEARER:
            continue
        costs = f"costs {max(0.0, dearer - 1):.0%} more {what} (data.max_length)"
        if counted:
            return f"{cut:.1%} of the targets were cut at {chosen:,}: {longer.tokens:,} cuts {left:.1%} and {costs}"
        return (
            f"{cut:.1%} of the training examples are longer than max_length {chosen:,}: {longer.tokens:,} leaves "
            f"{left:.1%} and {costs}"
        )
    return None


def _base_was_right(report: Report) -> str | None:
    """By the recipe's metric where that is right or wrong; else word for word."""
    match, metric = report.exact_match, report.metric
    if metric is not None and metric.name != _A_DEGREE:
        right, asked, by = metric.scores.before, metric.scores.examples, f" ({metric.name})"
    elif match is not None:
        right, asked, by = match.base, match.examples, ""
    else:
        return None
    if right < _RIGHT:
        return None
    return (
        f"the base was already right on {right:.0%} of {asked:,} answers{by}: examples that it cannot answer yet would "
        "teach more"
    )


def _worse_sources(report: Report) -> str | None:
    worse = [f"{base.name} ({a:.4g} -> {b:.4g})" for base, a, b in _by_source(report) if b > a * _WORSE]
    if not worse:
        return None
    return f"the loss has risen on {', '.join(worse)}: give what is to be kept a larger weight in data.train"


def _unlearned_sources(report: Report) -> str | None:
    same = [base.name for base, a, b in _by_source(report) if a * _LEARNED <= b <= a * _WORSE]
    if not same or report.sweet_spot.step == 0:
        return None
    return f"nothing was learned of {', '.join(same)}: look at its examples, or leave it out"


def _far_examples(report: Report) -> str | None:
    found = report.compared
    if found is None or not found.outliers:
        return None
    named = ", ".join(each.where for each in found.outliers[:_MANY_OUTLIERS])
    return (
        f"much less was learned of {found.outliers_in_all:,} held-out examples than of the others; wrong labels show "
        f"there, so look at {named} first"
    )


def _few_held_out(report: Report) -> str | None:
    used = report.data.validation.used
    if used >= _FEW:
        return None
    return (
        f"{used} held-out examples are few: below {_FEW} it is half chance which step is chosen; give more with "
        "data.validation"
    )


def _wrong_lines(report: Report) -> str | None:
    data = report.data
    if not data.bad_lines or not data.first_bad_lines:
        return None
    first = data.first_bad_lines[0]
    return f"wrong lines were left out ({data.bad_lines:,}): mend them, the first is {first.where} ({first.reason})"


def _repeated_examples(report: Report) -> str | None:
    train = report.data.train
    if train.duplicates <= _REPEATED * train.rows:
        return None
    return (
        f"{train.duplicates:,} of {train.rows:,} training examples ({train.duplicates / max(1, train.rows):.0%}) "
        "repeat another one: leave them out, unless they are to count more"
    )


def _dear_evaluations(report: Report) -> str | None:
    spent = report.throughput.phase_seconds
    judged, trained = spent.get("evaluate", 0.0), spent.get("train", 0.0)
    if judged <= _MOST_EVALUATION * (judged + trained) or judged + trained <= 0:
        return None
    return (
        f"evaluations took {judged / (judged + trained):.0%} of the time beside training: lower evaluate.max_examples, "
        "or raise evaluate.every_steps"
    )


def _late_stop(report: Report) -> str | None:
    stop = report.stop
    if stop.fits is not False or stop.needed_seconds is None:
        return None
    return (
        f"a stop needs about {stop.needed_seconds:.0f} s and was given {stop.grace_seconds:.0f}: give the job more "
        "time between the request and the kill, and say so with --grace-seconds"
    )


def _by_source(report: Report) -> list[tuple[SourceLoss, float, float]]:
    """Each held-out source with its loss before training and at the chosen step."""
    base = report.evaluations[0]
    chosen = next((each for each in report.evaluations if each.step == report.sweet_spot.step), base)
    pairs = zip(base.sources, chosen.sources, strict=True)
    return [(a, a.loss, b.loss) for a, b in pairs if a.loss is not None and b.loss is not None]


def _length(report: Report, times: float) -> str:
    """The run's length as the recipe sets it, so many times as long."""
    epochs = _number(report, "train", "epochs")
    if epochs is not None:
        return f"train.epochs: {epochs * times:.2g}"
    return f"train.steps: {_round(report.plan.steps * times):,}".replace(",", "")


def _number(report: Report, section: str, key: str) -> float | None:
    """A value of the recipe, which a bucket may hold in any form."""
    part: Any = report.recipe.get(section)
    value = part.get(key) if isinstance(part, dict) else None
    return value if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None


def _round(steps: float) -> int:
    """To two digits: no more is known."""
    whole = max(1, math.ceil(steps))
    unit = int(10 ** max(0, len(str(whole)) - 2))
    return math.ceil(whole / unit) * unit


_RULES: Sequence[Callable[[Report], str | None]] = (
    _shared_examples,
    _nothing_better,
    _still_falling,
    _best_early,
    _cut_targets,
    _worse_sources,
    _unlearned_sources,
    _base_was_right,
    _far_examples,
    _few_held_out,
    _wrong_lines,
    _repeated_examples,
    _dear_evaluations,
    _late_stop,
)
