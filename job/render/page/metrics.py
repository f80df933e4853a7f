"""What a page shows of answers by the recipe's metric, of slices, and of the change since the run before."""

from collections.abc import Iterator, Sequence

from job.core.judging.example_results import ChangeReport
from job.core.judging.judged_answers import MetricReport
from job.core.reports.report import Report
from job.render.metric_text import by_chance, compared_with, gain_text, loss_text, score_cells
from job.render.page.blocks import Block, Chapter, Room, Table, Words
from job.render.page.cost import moment

_HEAD = ("n", "base", "tuned", "gain", "95 %")


def metric_chapter(metric: MetricReport | None, room: Room) -> Chapter | None:
    """Scores of both models' answers; None: none was judged."""
    if metric is None:
        return None
    blocks: list[Block] = [Words(text=f"{compared_with(metric, room.cut)} {gain_text(metric.scores)}")]
    if metric.not_judged:
        blocks.append(Words(text=f"{metric.not_judged:,} more were answered and hold nothing to compare with."))
    if metric.sources:
        rows = [(room.cut(each.name), *score_cells(each.scores)) for each in metric.sources]
        blocks += _tables("Answers by source", ("source", *_HEAD), rows, room)
    for field in dict.fromkeys(each.slice.field for each in metric.slices):
        own = [each for each in metric.slices if each.slice.field == field]
        rows = [(room.cut(each.slice.words), *score_cells(each.scores)) for each in own]
        blocks += _tables(f"Answers by {room.cut(field)}", (room.cut(field), *_HEAD), rows, room)
    return Chapter(anchor="metric", name="Metric", blocks=blocks)


def losses_by_slice(report: Report, room: Room) -> list[Block]:
    """Validation loss by the values of each field that the recipe names."""
    base = report.evaluations[0]
    chosen = next(each for each in report.evaluations if each.step == report.sweet_spot.step)
    blocks: list[Block] = []
    for field in dict.fromkeys(each.slice.field for each in base.slices):
        rows = [
            (
                room.cut(a.slice.words),
                f"{a.examples:,}",
                loss_text(a.loss, a.plus_minus),
                loss_text(b.loss, b.plus_minus),
                f"{b.loss - a.loss:+.4f}",
            )
            for a, b in zip(base.slices, chosen.slices, strict=True)
            if a.slice.field == field
        ]
        head = (room.cut(field), "n", "base loss, 95 %", "tuned loss, 95 %", "change")
        blocks += _tables(f"Validation loss by {room.cut(field)}", head, rows, room)
    return blocks


def change_chapter(change: ChangeReport | None) -> Chapter | None:
    """What differs from the run before; None: there is none to compare with."""
    if change is None:
        return None
    loss = change.loss
    around = "" if loss.low is None or loss.high is None else f" (95 % interval: {loss.low:+.4g} to {loss.high:+.4g})"
    said = (
        f"Against run {change.run_id[:200]}, finished {moment(change.finished)}, on the same {loss.examples:,} "
        f"held-out examples: the tuned model's loss went from {loss.before:.4f} to {loss.after:.4f} nats a token, by "
        f"{loss.change:+.4g}{around}{by_chance(loss.low, loss.high)}."
    )
    blocks: list[Block] = [Words(text=said)]
    if change.scores is not None:
        blocks.append(Words(text=f"Its answers, by the same metric: {gain_text(change.scores)}"))
    return Chapter(anchor="change", name="Change since the run before", blocks=blocks)


def _tables(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], room: Room) -> Iterator[Table]:
    if rows:
        shown = rows[: room.rows]
        yield Table(caption=caption, head=head, rows=shown, left_out=len(rows) - len(shown))
