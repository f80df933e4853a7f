"""The data as it was used: sources, what was left out and why, lengths and what each max_length cuts, examples."""

from collections.abc import Iterator

from job.core.data.report_data import DataReport, SideReport
from job.core.reports.report import Report
from job.render.page import figures
from job.render.page.blocks import Block, Chapter, Example, Facts, Listing, Picture, Pictures, Room, Table

_MOST_PREVIEWS = 6


def data_chapter(report: Report, room: Room) -> Chapter:
    """All of it."""
    data = report.data
    blocks: list[Block] = [_sides(data), *_sources(report, room), *_left_out(data, room), *_lengths(data, room)]
    return Chapter(anchor="data", name="Data", blocks=[*blocks, *_previews(data, room)])


def _sides(data: DataReport) -> Block:
    def row(name: str, side: SideReport) -> tuple[str, ...]:
        counts = side.used, side.rows, side.duplicates, side.truncated, side.dropped, side.without_target, side.empty
        return name, *(f"{count:,}" for count in counts), f"{side.tokens:,}", f"{side.targets:,}"

    head = (
        "side",
        "used",
        "read",
        "repeated",
        "cut",
        "too long",
        "nothing to learn",
        "empty answer",
        "tokens",
        "learned",
    )
    rows = [row("training", data.train), row("held out", data.validation)]
    return Table(caption="Examples on each side", head=head, rows=rows)


def _sources(report: Report, room: Room) -> Iterator[Block]:
    pairs = [*zip(report.data.train.sources, report.plan.sources, strict=True)]
    if not pairs:
        return
    rows = [
        (
            room.cut(source.name),
            f"{source.used:,}",
            f"{share.share:.1%}",
            f"{share.epochs:.3g}",
            f"{share.examples:,}",
            f"{source.percentiles.get('p50', 0):,}",
            f"{source.percentiles.get('p100', 0):,}",
        )
        for source, share in pairs[: room.rows]
    ]
    head = ("source", "examples", "share of a step", "epochs", "drawn", "median tokens", "longest")
    yield Table(caption="Sources", head=head, rows=rows, left_out=len(pairs) - len(rows))


def _left_out(data: DataReport, room: Room) -> Iterator[Block]:
    if data.overlap:
        yield Listing(items=[f"{data.overlap:,} held-out examples are also trained on: the validation loss flatters."])
    if data.first_bad_lines:
        shown = [(room.cut(line.where), room.cut(line.reason)) for line in data.first_bad_lines[: room.rows]]
        named = f"Lines that were left out ({data.bad_lines:,} wrong, {data.train.empty:,} with an empty answer)"
        left_out = max(0, data.bad_lines + data.train.empty + data.validation.empty - len(shown))
        yield Table(caption=named, head=("line", "why"), rows=shown, words=(0, 1), left_out=left_out)
    if data.first_left_out:
        sides = data.train, data.validation
        long, without = (sum(counts) for counts in zip(*((s.dropped, s.without_target) for s in sides), strict=True))
        shown = [(room.cut(line.where), room.cut(line.reason)) for line in data.first_left_out[: room.rows]]
        named = f"Examples that were left out ({long:,} too long, {without:,} with nothing to learn)"
        left_out = max(0, long + without - len(shown))
        yield Table(
            caption=named, head=("example", "why"), rows=shown, words=(0, 1), left_out=left_out, rest_in="the data"
        )


def _lengths(data: DataReport, room: Room) -> Iterator[Block]:
    drawing = figures.lengths(data.train.histogram, max_length=data.max_length)
    reason = room.cut(data.max_length_reason)
    caption = f"Lengths of the training examples before the cut. max_length {data.max_length:,}: {reason}"
    yield Pictures(pictures=[Picture(drawing=drawing, caption=caption)])
    if data.candidates:
        shown = data.candidates[: room.rows]
        rows = [
            (
                f"{each.tokens:,}",
                f"{each.examples_over:,}",
                f"{each.share_cut:.2%}",
                "-" if each.targets_cut is None else f"{each.targets_cut:.2%}",
                "-" if each.work is None else f"{each.work:.2f}",
            )
            for each in shown
        ]
        yield Table(
            caption="What each max_length would cut",
            head=("max_length", "examples longer", "tokens cut", "learned ones cut", "times the work"),
            rows=rows,
            words=(),
            marked=next((n for n, each in enumerate(shown) if each.tokens == data.max_length), None),
            left_out=len(data.candidates) - len(shown),
        )


def _previews(data: DataReport, room: Room) -> Iterator[Block]:
    for example in data.preview[: min(_MOST_PREVIEWS, room.rows)]:
        pieces = example.pieces[: room.rows]
        shown = [piece.model_copy(update={"text": room.cut(piece.text)}) for piece in pieces]
        where, source = room.cut(example.where), room.cut(example.source)
        said = f"{where}, {example.shown} of {source}: {example.tokens:,} tokens, {example.learned:,} learned (marked)"
        if example.left_out is not None:
            said += f"; not trained on: {example.left_out}"
        if example.cut:
            said += f"; {example.cut:,} tokens beyond max_length are cut"
        yield Example(example=example.model_copy(update={"pieces": tuple(shown)}), name=said)
    hidden = len(data.preview) - min(_MOST_PREVIEWS, room.rows, len(data.preview))
    if hidden:
        yield Facts(facts={"more examples": f"{hidden:,} in report.json"})
