"""A report, a histogram and a table of checks as plain text for a terminal."""

import math
from collections.abc import Mapping, Sequence

from job.core.judging.example_results import ChangeReport
from job.core.judging.judged_answers import Gain, MetricReport
from job.core.judging.verdict import NOTHING_BETTER
from job.core.lines import worth_naming
from job.core.reports.next_steps import next_steps
from job.core.reports.report import Report
from job.render.ceiling_text import ceiling_words
from job.render.channel_text import promotion_lines
from job.render.metric_text import interval, points
from job.render.preview_text import example_lines
from job.render.sources_text import source_lines

_BAR = 24
"""Characters of the longest bar: with the lengths and counts beside it a line has room in 80 columns."""
_WHOLE_SECONDS = 100
"""From here on tenths of a second say nothing."""


def histogram_lines(edges: Sequence[int], counts: Sequence[int], *, mark: int | None = None) -> list[str]:
    """A histogram as bars, a line for each bin; `mark` points at the bin where max_length lies."""
    most = max(counts, default=0) or 1
    width = len(str(edges[-1]))
    lines = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * math.ceil(_BAR * count / most)
        pointer = "  <- max_length" if mark is not None and low <= mark < high else ""
        lines.append(f"  {low:>{width}}-{high - 1:<{width}} {count:>7} {bar}{pointer}")
    return lines


def report_lines(report: Report) -> list[str]:
    """What a person wants to know first: did it learn, which checkpoint, how do the answers look, what did it cost."""
    return [
        f"run {report.run_id}  {report.run_uri}",
        "",
        *_outcome(report),
        "",
        *_evaluations(report),
        "",
        *_data(report),
        *source_lines(report),
        "",
        *_cost(report),
        *_learned(report),
        *_answers(report),
    ]


def _outcome(report: Report) -> list[str]:
    spot, parent = report.sweet_spot, None if report.promotion is None else report.promotion.parent
    start, nothing = "base", NOTHING_BETTER
    if parent is not None:
        start, nothing = f"{parent.run_id}", "nothing better than what it started from was found"
    lines = [
        *promotion_lines(report.promotion),
        *([f"verdict            {nothing}: the adapter leaves it as it is"] if spot.step == 0 else []),
        f"validation loss    {start} {spot.base_loss:.4f} -> tuned {spot.loss:.4f} nats a token",
        f"chosen checkpoint  step {spot.step} of {report.plan.steps} ({spot.reason})",
        "overfitting        "
        + (
            "not seen"
            if spot.overfitting_from_step is None
            else f"from step {spot.overfitting_from_step} on: significantly worse than step {spot.best_step}"
        ),
    ]
    if report.exact_match is not None:
        match = report.exact_match
        lines.append(
            f"exact match        base {match.base:.0%} -> tuned {match.tuned:.0%} of {match.examples} held out"
        )
    lines += _metric(report.metric) + _change(report.change)
    lines.append(f"adapter            {report.adapter.uri} (proven: loss {report.adapter.proven_loss:.4f})")
    lines += [f"note               {note}" for note in report.notes]
    return lines + [f"what next          {step}" for step in next_steps(report)]


def _metric(metric: MetricReport | None) -> list[str]:
    if metric is None:
        return []
    scores, named = metric.scores, metric.name != "exact_match"
    found = f"base {scores.before:.1%} -> tuned {scores.after:.1%} of {scores.examples} held out"
    lines = [f"{metric.name.replace('_', ' '):<19}{found}"] if named else []
    lines.append(f"gain in answers    {_points(scores)}")
    for each in metric.slices:
        if each.scores is not None:
            name = f"{each.slice.field} {each.slice.words}"
            lines.append(f"                   {_one_line(name, 40)}: {_points(each.scores)}, n {each.scores.examples}")
    return lines


def _points(scores: Gain) -> str:
    ends = interval(scores)
    return f"{points(scores.gain)} points" + ("" if ends is None else f" (95 %: {ends})")


def _change(change: ChangeReport | None) -> list[str]:
    """Since the run before."""
    if change is None:
        return []
    loss = change.loss
    around = "" if loss.low is None or loss.high is None else f" (95 %: {loss.low:+.4f} to {loss.high:+.4f})"
    lines = [
        f"run before         {change.run_id} on the same {loss.examples} examples",
        f"                   loss {loss.before:.4f} -> {loss.after:.4f}, {loss.change:+.4f}{around}",
    ]
    if change.scores is not None:
        lines.append(f"                   answers {_points(change.scores)}")
    return lines


def _evaluations(report: Report) -> list[str]:
    spot = report.sweet_spot
    lines = ["  step       loss  perplexity  token accuracy"]
    for e in report.evaluations:
        pointer = "  <- chosen" if e.step == spot.step else ""
        lines.append(f"{e.step:>6} {e.loss:>10.4f} {e.perplexity:>11.4g} {e.token_accuracy:>15.1%}{pointer}")
    chosen = [each for e in report.evaluations if e.step == spot.step for each in e.slices]
    for base, tuned in zip(report.evaluations[0].slices, chosen, strict=False):
        around = "" if tuned.plus_minus is None else f" +- {tuned.plus_minus:.2g}"
        name = _one_line(f"{base.slice.field} {base.slice.words}", 40)
        lines.append(f"  {name}: loss {base.loss:.4f} -> {tuned.loss:.4f}{around}, n {base.examples}")
    return lines


def _data(report: Report) -> list[str]:
    data = report.data
    lines = [
        (
            f"data: {data.train.used} training and {data.validation.used} held-out examples; "
            f"max_length {data.max_length} ({data.max_length_reason})"
        )
    ]
    counted = {
        "wrong lines left out": data.bad_lines,
        "duplicates": data.train.duplicates,
        "held out and trained on": data.overlap,
        "truncated": data.train.truncated,
        "too long and dropped": data.train.dropped,
        "nothing to learn from": data.train.without_target,
        "empty answers left out": data.train.empty,
    }
    seen = [f"{name} {count}" for name, count in counted.items() if count]
    return lines + (["      " + ", ".join(seen)] if seen else [])


def _learned(report: Report) -> list[str]:
    """The first training example, as it was learned."""
    lines = [line for each in report.data.preview[:1] for line in example_lines(each, width=None, colours=False)]
    return ["", *lines] if lines else []


def _cost(report: Report) -> list[str]:
    speed, model = report.throughput, report.model
    total = sum(speed.phase_seconds.values())
    return [
        (
            f"model: {model.base} ({model.architecture}, {model.quantisation}), "
            f"{model.trainable_parameters:,} of {model.total_parameters:,} parameters trained"
        ),
        (
            f"speed: {speed.tokens_per_second:,.0f} real tokens a second, {speed.step_seconds_median:.3f} s a step, "
            f"peak memory {speed.peak_memory_bytes / 2**30:.2f} GiB on {report.device}"
        ),
        *_together(report),
        *([] if (share := ceiling_words(speed)) is None else [f"       {share}"]),
        f"time:  {_seconds(total)} s in this attempt: {_parts(speed.phase_seconds)}",
        *_start(report),
        *(
            f"attempt {a.number}: "
            + ("ended without a word" if a.exit_code is None else f"exit {a.exit_code}: {a.reason}")
            for a in report.attempts
            if len(report.attempts) > 1
        ),
    ]


def _together(report: Report) -> list[str]:
    """How well the processes of a run worked together, where there were several."""
    speed = report.throughput
    if speed.ranks == 1:
        return []
    nodes = f" on {speed.nodes} nodes" if speed.nodes > 1 else ""
    nodes += ", the base sharded over them" if speed.placement == "sharded" else ""
    each = f"{speed.tokens_per_second_a_rank:,.0f} tokens a second each"
    lost = f"{speed.waited_seconds:.1f} s waited for others in this attempt"
    return [f"       by {speed.ranks} processes{nodes}: {each}, {lost}, {speed.bytes_a_step / 1e6:,.1f} MB sent a step"]


def _start(report: Report) -> list[str]:
    """What the wait for the first step was spent on."""
    if report.start is None:
        return []
    base = f" (base from {report.model.loaded_from})"
    spent = _parts(report.start.spent)
    return [f"start: {report.start.seconds:.1f} s until the first step was done{base}: {spent}"]


def _parts(seconds: Mapping[str, float]) -> str:
    """The longest first; what is nothing beside them is added up."""
    shown = {name: _seconds(each) for name, each in worth_naming(seconds).items()}
    return ", ".join(f"{name} {each}" for name, each in shown.items() if each != "0.0")


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= _WHOLE_SECONDS else f"{seconds:.1f}"


def _answers(report: Report, most: int = 6) -> list[str]:
    lines = []
    for answer in report.answers[:most]:
        lines += ["", f"  prompt    {_one_line(answer.prompt)}"]
        if answer.expected is not None:
            lines.append(f"  expected  {_one_line(answer.expected)}")
        lines += [f"  base      {_one_line(answer.base)}", f"  tuned     {_one_line(answer.tuned)}"]
    if len(report.answers) > most:
        lines += ["", f"  ... and {len(report.answers) - most} more in report.json"]
    return lines


def _one_line(text: str, most: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 3] + "..."
