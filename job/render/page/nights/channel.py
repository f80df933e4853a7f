"""A channel -> what its page shows: what is in use and why, its nights, new records, error budget, goodput and cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from job.core.nightly.channel import ChannelState, FreshNight, Night, NightWork, Promoted, name_in_use, waiting_for
from job.core.nightly.error_budget import YEAR_DAYS
from job.render.page.blocks import Block, Chapter, Facts, Fold, Page, Picture, Pictures, Room, Table, Words
from job.render.page.cost import moment, seconds_text
from job.render.page.nights.drawings import (
    FreshLine,
    budget_drawing,
    fresh_drawing,
    moment_of,
    nights_drawing,
    work_drawing,
)
from job.render.page.writing import written

_HOUR = 3600
_AT_ONCE = 14
"""Nights that are seen without asking."""
_STATE = "state.json"
_TO_DO = "Start `run` once more: it brings the channel's copy of the adapter up to date."


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSeen:
    """What is known of a channel."""

    uri: str
    changes: Sequence[Promoted]
    """Of what is in use, newest first."""
    state: ChannelState | None
    """None: it has none."""
    today: int
    """As the budget counts days."""
    is_current: bool
    """Whether the channel's copy of the adapter is that in use."""

    @property
    def nights(self) -> Sequence[Night]:
        """The last ones, oldest first."""
        return () if self.state is None else self.state.nights


def channel_html(channel: ChannelSeen) -> bytes:
    """The page of a channel."""
    return written(partial(_page, channel))


def _page(channel: ChannelSeen, room: Room) -> Page:
    now, nights = (channel.changes[0] if channel.changes else None), channel.nights
    state = channel.state
    chapters = [
        *_nights(nights, room),
        *_fresh(channel, room),
        *([] if state is None else [_budget(state, channel.today)]),
        *_waiting(channel, room),
        *_work(nights, room),
        *_changes(channel.changes, room),
    ]
    return Page(
        title=f"Channel {channel.uri}"[:300],
        standing=f"As of {moment(nights[-1].time)}" if nights else "No night yet",
        verdict=room.cut(_verdict(now)),
        figures=_figures(channel, now),
        to_do=[]
        if channel.is_current
        else ["Start `run` once more: it brings the channel's copy of the adapter up to date."],
        to_do_none="Nothing here asks for a hand; `channel CHANNEL --rollback` goes back to what was in use before.",
        chapters=chapters,
    )


def _verdict(now: Promoted | None) -> str:
    if now is None:
        return "The base is in use: nothing was promoted yet."
    name = "The base" if now.run_id is None else now.run_id
    return f"{name} is in use since {moment(now.since)}. {now.why}"


def _figures(channel: ChannelSeen, now: Promoted | None) -> dict[str, str]:
    nights, state = channel.nights, channel.state
    shown = {"in use": name_in_use(now)[:60], "nights": f"{len(nights):,}"}
    shown["promoted"] = f"{sum(each.outcome == 'promoted' for each in nights):,}"
    if state is not None:
        spent = state.budget.spent_since(channel.today - YEAR_DAYS + 1)
        shown["error budget spent"] = f"{spent:.3f} of {state.budget.per_year:g}"
    if goodput := _goodput([each.work for each in nights if each.work is not None]):
        shown["goodput"] = goodput
    return shown


def _nights(nights: Sequence[Night], room: Room) -> list[Chapter]:
    if not nights:
        return []
    picture = Picture(
        drawing=nights_drawing(nights),
        caption="Loss on the frozen examples: each night's model, what came of it, and the model it was compared with.",
        is_wide=True,
    )
    last = nights[::-1]
    rows = [
        (
            moment(each.time).removesuffix(" UTC"),
            room.cut(each.run_id),
            each.outcome if each.outcome != "refused" else each.verdict,
            room.cut(each.champion),
            f"{each.challenger_loss:.4f}",
            f"{each.champion_loss:.4f}",
            f"{each.mean:+.4f}",
            "-" if each.low is None or each.high is None else f"{each.low:+.4f} to {each.high:+.4f}",
            room.cut(each.why),
        )
        for each in last[: room.rows]
    ]
    head = ("night (UTC)", "run", "outcome", "against", "loss", "of that", "difference", "95 %", "why")
    newest = _table("The last nights, the newest first; below 0 the night's model is better", head, rows[:_AT_ONCE])
    blocks: list[Block] = [Pictures(pictures=[picture]), newest]
    if len(rows) > _AT_ONCE:
        left_out = len(nights) - len(rows)
        before = _table("Earlier ones", head, rows[_AT_ONCE:], left_out=left_out)
        blocks.append(Fold(name=f"{len(rows) - _AT_ONCE:,} nights before", blocks=[before]))
    return [Chapter(anchor="nights", name="Nights", blocks=blocks)]


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, left_out: int = 0) -> Table:
    return Table(caption=caption, head=head, rows=rows, words=(0, 1, 2, 3, 8), left_out=left_out, rest_in=_STATE)


def _fresh(channel: ChannelSeen, room: Room) -> Iterator[Chapter]:
    found = () if channel.state is None else channel.state.fresh
    if not found:
        return
    lines = [_line(each, channel.changes) for each in found]
    blocks: list[Block] = [Words(text="Each night's new records, scored before any model was trained on them.")]
    if any(each.in_use is not None for each in lines):
        caption = "Loss on new records: of the model in use, and of challengers that waited for them."
        blocks.append(Pictures(pictures=[Picture(drawing=fresh_drawing(lines), caption=caption)]))
    rows = [
        (
            moment(each.night.time),
            f"{each.night.records:,}",
            "-" if each.in_use is None else f"{each.in_use:.4f}",
            room.cut(", ".join(f"{name} {loss:.4f}" for name, loss in each.night.losses.items())),
        )
        for each in lines[::-1][: min(room.rows, _AT_ONCE)]
    ]
    head = ("night", "records", "in use", "each model")
    left_out = len(lines) - len(rows)
    blocks.append(Table(caption="New records", head=head, rows=rows, words=(0, 3), left_out=left_out, rest_in=_STATE))
    yield Chapter(anchor="fresh", name="New records", blocks=blocks)


def _line(night: FreshNight, changes: Sequence[Promoted]) -> FreshLine:
    """A night by who was in use: the newest change before it."""
    before = [each for each in changes if moment_of(each.since) <= moment_of(night.time)]
    name = name_in_use(before[0] if before else None)
    return FreshLine(
        night=night,
        in_use=night.losses.get(name),
        others=[loss for other, loss in night.losses.items() if other != name],
    )


def _budget(state: ChannelState, today: int) -> Chapter:
    budget = state.budget
    caption = (
        "Wrong promotions that the tests of the 365 days before may have made, as an expectation, and how many may be."
    )
    facts = {
        "spent in 365 days": f"{budget.spent_since(today - YEAR_DAYS + 1):.3f} of {budget.per_year:g}",
        "saved": f"{budget.left:.4f}",
        "tests": f"{budget.tests:,}",
        "over the channel's life": f"{budget.total:.3f}",
    }
    blocks: list[Block] = [Facts(facts=facts)]
    if budget.spent:
        drawing = budget_drawing(budget.spent, budget.per_year, today=today)
        blocks.insert(0, Pictures(pictures=[Picture(drawing=drawing, caption=caption)]))
    return Chapter(anchor="budget", name="Error budget", blocks=blocks)


def _waiting(channel: ChannelSeen, room: Room) -> Iterator[Chapter]:
    state = channel.state
    if state is None:
        return
    rows = [
        (
            room.cut(each.challenger),
            f"{each.records:,}",
            f"{len(each.nights):,}",
            f"{each.e_better:.3g}",
            f"{1 / each.level:,.0f}" if each.level else "-",
        )
        for each in waiting_for(state, name_in_use(channel.changes[0] if channel.changes else None))
    ]
    blocks: list[Block] = []
    if rows:
        shown = rows[: room.rows]
        head = ("run", "new records", "nights", "evidence", "is enough")
        caption = "Not promoted, and judged by every night's new records until that is enough"
        left_out = len(rows) - len(shown)
        blocks.append(Table(caption=caption, head=head, rows=shown, left_out=left_out, rest_in=_STATE))
    blocks += [
        Words(text=f"{room.cut(run_id)} lost its swap, and is judged again next night.")
        for run_id in state.again[: room.rows]
    ]
    if blocks:
        yield Chapter(anchor="waiting", name="Who waits", blocks=blocks)


def _work(nights: Sequence[Night], room: Room) -> Iterator[Chapter]:
    worked = [(each, each.work) for each in nights if each.work is not None]
    if not worked:
        return
    works = [work for _, work in worked]
    facts = {
        "nights that trained": f"{len(worked):,}",
        "GPU hours": f"{sum(map(_gpu_hours, works)):,.2f}",
        **({"goodput": f"{goodput} of that time in training steps"} if (goodput := _goodput(works)) else {}),
        "trained on": f"{sum(work.tokens for work in works):,} real tokens",
    }
    rows = [
        (
            moment(night.time),
            room.cut(night.run_id),
            room.cut(work.device or "-"),
            f"{work.ranks:,}",
            f"{work.attempts:,}",
            seconds_text(work.held_seconds),
            f"{_gpu_hours(work):,.2f}",
            _goodput([work]) or "-",
            f"{work.tokens:,}",
        )
        for night, work in worked[::-1][: min(room.rows, _AT_ONCE)]
    ]
    head = ("night", "run", "device", "GPUs", "attempts", "held", "GPU hours", "goodput", "tokens")
    table = Table(
        caption="What each night took",
        head=head,
        rows=rows,
        words=(0, 1, 2),
        left_out=len(worked) - len(rows),
        rest_in=_STATE,
    )
    picture = Picture(
        drawing=work_drawing(nights), caption="GPU hours of each night, and how many were training steps."
    )
    blocks: list[Block] = [Facts(facts=facts), Pictures(pictures=[picture]), table]
    yield Chapter(anchor="cost", name="Goodput and cost", blocks=blocks)


def _gpu_hours(work: NightWork) -> float:
    return work.held_seconds * work.ranks / _HOUR


def _goodput(works: Sequence[NightWork]) -> str | None:
    """Of the time that is known of; None: of none."""
    held = sum(work.held_seconds * work.ranks for work in works)
    trained = sum(work.train_seconds * work.ranks for work in works)
    return f"{trained / held:.0%}" if held and trained <= held else None


def _changes(changes: Sequence[Promoted], room: Room) -> Iterator[Chapter]:
    if not changes:
        return
    rows = [
        (
            f"{each.sequence:,}",
            moment(each.since),
            each.kind,
            room.cut(name_in_use(each)),
            room.cut(each.by),
            room.cut(each.why),
        )
        for each in changes[: room.rows]
    ]
    table = Table(
        caption="Changes of what is in use, the newest first",
        head=("no.", "since", "by", "in use", "machine", "why"),
        rows=rows,
        words=(1, 2, 3, 4, 5),
        marked=0,
        left_out=len(changes) - len(rows),
        rest_in="history/",
    )
    yield Chapter(anchor="changes", name="Changes", blocks=[table])
