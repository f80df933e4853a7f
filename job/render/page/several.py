"""Several runs -> what their page shows: their losses laid over each other, and the table that compares them."""

from collections.abc import Sequence
from functools import partial

from job.render.page import figures
from job.render.page.blocks import Block, Chapter, Page, Picture, Pictures, Room, Table
from job.render.page.writing import written
from job.render.runs_table import RunRow, compared


def several_html(rows: Sequence[RunRow]) -> bytes:
    """The page of several runs, in the order in which they are given."""
    return written(partial(_page, rows))


def _page(rows: Sequence[RunRow], room: Room) -> Page:
    finished = sum(row.report is not None for row in rows)
    found = compared(rows)
    cells = [
        (f"{number}", *(room.cut(cell) for cell in each), *[""] * (len(found.head) - len(each)))
        for number, each in enumerate(found.cells, start=1)
    ][: room.rows]
    standing = [(*cell, room.cut(row.standing)) for cell, row in zip(cells, rows, strict=False)]
    words = (0, *(place + 1 for place, name in enumerate(found.head) if name in found.words), len(found.head) + 1)
    table = Table(
        caption="Runs",
        head=("no.", *found.head, "standing"),
        rows=standing,
        words=words,
        marked=None if found.best is None or found.best >= len(standing) else found.best,
        left_out=len(rows) - len(standing),
    )
    blocks: list[Block] = [table]
    return Page(
        title=f"{len(rows):,} runs",
        standing=f"{finished:,} of {len(rows):,} are finished",
        verdict=room.cut(f"{found.verdict[:1].upper()}{found.verdict[1:]}"),
        figures={},
        to_do=[],
        to_do_none="The page of each run says what to do next about it: report RUN --html FILE.",
        chapters=[*_curves(rows), Chapter(anchor="runs", name="Runs", blocks=blocks)],
    )


def _curves(rows: Sequence[RunRow]) -> list[Chapter]:
    lines = [
        figures.RunLine(number=number, report=row.report)
        for number, row in enumerate(rows, start=1)
        if row.report is not None
    ]
    if not lines:
        return []
    drawing, left_out = figures.several(lines)
    more = f" {left_out:,} more are in the table alone." if left_out else ""
    caption = f"Validation loss of the finished runs; their numbers are those of the table.{more}"
    blocks: list[Block] = [Pictures(pictures=[Picture(drawing=drawing, caption=caption, is_wide=True)])]
    return [Chapter(anchor="curves", name="Curves", blocks=blocks)]
