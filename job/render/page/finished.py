"""A finished run's report -> what its page shows, in the order in which it is asked for."""

from collections.abc import Sequence
from functools import partial

from job.core.reports.next_steps import next_steps
from job.core.reports.report import OWN_NAME, Report
from job.render.metric_text import METRIC_WORDS, loss_text
from job.render.page import figures
from job.render.page.answers import answers_chapter
from job.render.page.blocks import Block, Chapter, Page, Picture, Pictures, Room, Table, Words
from job.render.page.cost import cost_chapter, moment
from job.render.page.data import data_chapter
from job.render.page.facts import facts_chapters
from job.render.page.metrics import change_chapter, losses_by_slice, metric_chapter
from job.render.page.nights.night import night_chapter
from job.render.page.writing import written
from job.render.verdict_text import verdict_text


def report_html(report: Report) -> bytes:
    """The page of a finished run."""
    return written(partial(_page, report))


def _page(report: Report, room: Room) -> Page:
    promotion = report.promotion
    champion = None if promotion is None else promotion.judged.decision.champion
    metric = None if report.metric is None else report.metric.name
    night, answers = (
        night_chapter(promotion, room),
        answers_chapter(report.answers, room, metric=metric, champion=champion),
    )
    chapters = [
        night,
        *([] if night is None else [answers]),
        change_chapter(report.change),
        _curves(report),
        _evaluations(report, room),
        metric_chapter(report.metric, room),
        *([answers] if promotion is None else []),
        _examples(report, room),
        data_chapter(report, room),
        cost_chapter(report, room),
        *facts_chapters(report, room),
    ]
    return Page(
        title=f"{report.model.base}, run {report.run_id}"[:300],
        standing=f"Finished {moment(report.finished)}",
        verdict=verdict_text(report) if promotion is None else f"{room.cut(promotion.said)} {verdict_text(report)}",
        figures=_figures(report),
        to_do=[room.cut(f"{step[:1].upper()}{step[1:]}.") for step in next_steps(report)],
        to_do_none="Nothing in the figures of this run asks for another one.",
        chapters=[chapter for chapter in chapters if chapter is not None],
        made_by=room.cut(report.versions.get(OWN_NAME, "")) or None,
    )


def _figures(report: Report) -> dict[str, str]:
    spot, match, metric = report.sweet_spot, report.exact_match, report.metric
    shown = {
        "validation loss, base": f"{spot.base_loss:.4f}",
        "validation loss, tuned": f"{spot.loss:.4f}",
        "chosen step": f"{spot.step:,} of {report.plan.steps:,}",
    }
    if metric is not None and metric.name != "exact_match":
        name = f"{METRIC_WORDS[metric.name]}, {metric.scores.examples:,} answers"
        shown[name] = f"{metric.scores.before:.0%} → {metric.scores.after:.0%}"
    elif match is not None:
        shown[f"right answers of {match.examples:,}"] = f"{match.base:.0%} → {match.tuned:.0%}"
    return shown | {"real tokens a second": f"{report.throughput.tokens_per_second:,.0f}"}


def _curves(report: Report) -> Chapter:
    curve, found = report.curve, report.held_out
    around = found.plus_minus if found is not None else ()
    said = "The band is the 95 % interval over the held-out examples." if around else ""
    pictures = [
        Picture(
            drawing=figures.losses(curve, report.evaluations, report.sweet_spot, plus_minus=around),
            caption=f"Loss of training and validation, and the step that was chosen. {said}".strip(),
            is_wide=True,
        ),
    ]
    if curve.loss:
        pictures += [
            Picture(
                drawing=figures.by_step("rate", curve.learning_rate, says="learning rate"),
                caption="Learning rate of each step.",
            ),
            Picture(
                drawing=figures.by_step("norm", curve.grad_norm, says="gradient norm"),
                caption="Norm of the gradient, before it was clipped.",
            ),
        ]
    return Chapter(anchor="curves", name="Curves", blocks=[Pictures(pictures=pictures)])


def _evaluations(report: Report, room: Room) -> Chapter:
    judged, spot, found = report.evaluations, report.sweet_spot, report.held_out
    places = some_places(len(judged), room.rows, keep=next(i for i, e in enumerate(judged) if e.step == spot.step))
    around = found.plus_minus if found is not None else (None,) * len(judged)
    rows = [
        (
            f"{judged[i].step:,}" + (" (chosen)" if judged[i].step == spot.step else ""),
            f"{judged[i].loss:.4f}",
            "-" if around[i] is None else f"± {around[i]:.2g}",
            f"{judged[i].perplexity:#.4g}",
            f"{judged[i].token_accuracy:.1%}",
        )
        for i in places
    ]
    examples = report.data.validation.used
    blocks: list[Block] = [
        Table(
            caption=f"Each evaluation, on {examples:,} held-out examples ({judged[0].tokens:,} target tokens)",
            head=("step", "loss", "95 %", "perplexity", "token accuracy"),
            rows=rows,
            words=(),
            marked=next(n for n, i in enumerate(places) if judged[i].step == spot.step),
            left_out=len(judged) - len(places),
        ),
        *_by_source(report, room),
        *losses_by_slice(report, room),
    ]
    return Chapter(anchor="evaluations", name="Evaluations", blocks=blocks)


def _by_source(report: Report, room: Room) -> list[Block]:
    base = report.evaluations[0]
    chosen = next(each for each in report.evaluations if each.step == report.sweet_spot.step)
    rows = [
        (
            room.cut(a.name),
            f"{a.examples:,}",
            loss_text(a.loss, a.plus_minus),
            loss_text(b.loss, b.plus_minus),
            _change(a.loss, b.loss),
        )
        for a, b in zip(base.sources, chosen.sources, strict=True)
    ]
    if not rows:
        return []
    head = ("source", "held out", "base loss, 95 %", "tuned loss, 95 %", "change")
    left_out = max(0, len(rows) - room.rows)
    return [Table(caption="Validation loss by source", head=head, rows=rows[: room.rows], left_out=left_out)]


def _change(base: float | None, tuned: float | None) -> str:
    return "-" if base is None or tuned is None else f"{tuned - base:+.4f}"


def _examples(report: Report, room: Room) -> Chapter | None:
    """What became of the loss of each held-out example."""
    found, tried = report.compared, report.tried
    if found is None:
        return None
    step = "the chosen step" if tried is None else f"step {tried.step:,}"
    best = "" if tried is None else ", the best that was trained,"
    drawn = "" if len(found.base) == found.examples else f" {len(found.base):,} of them are drawn, evenly from all."
    blocks: list[Block] = [
        Words(
            text=f"At {step}{best} the loss has fallen on {found.examples - found.worse:,} of {found.examples:,} "
            f"held-out examples and risen on {found.worse:,}.{drawn}"
        ),
        Pictures(
            pictures=[
                Picture(
                    drawing=figures.examples(found, step),
                    caption=f"Each held-out example: its loss before training and at {step}, in nats a target token. "
                    "Below the line it was learned.",
                )
            ]
        ),
    ]
    if found.outliers:
        rows = [
            (
                room.cut(each.where),
                f"{each.tokens:,}",
                f"{each.base:.4f}",
                f"{each.tuned:.4f}",
                _change(each.base, each.tuned),
            )
            for each in found.outliers[: room.rows]
        ]
        blocks += [
            Table(
                caption="Far from the others: much less was learned of these. Wrong labels show here.",
                head=("example", "target tokens", "base loss", "tuned loss", "change"),
                rows=rows,
                left_out=found.outliers_in_all - len(rows),
            )
        ]
    else:
        blocks.append(Words(text="No example lies far from the others."))
    return Chapter(anchor="examples", name="Each example", blocks=blocks)


def some_places(count: int, most: int, *, keep: int) -> Sequence[int]:
    """Places evenly from the first to the last, at most so many, and one that is kept."""
    if count <= most:
        return range(count)
    spread = {i * (count - 1) // max(1, most - 2) for i in range(most - 1)} if most > 1 else set()
    return sorted({place for place in spread if place < count} | {keep})
