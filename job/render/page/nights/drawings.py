"""Draws a channel's nights, in the page's own colours and without any text of strangers."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from job.core.nightly.channel import FreshNight, Night
from job.core.nightly.error_budget import YEAR_DAYS, Spent
from job.render.page.svg import COLOURS, svg, wide

_HOUR = 3600
_INCHES_A_DATE = 1.5
"""Of an axis' width."""
_MANY = 100
"""Nights whose marks would hide each other in their usual size."""
_MARKS = {
    "promoted": ("*", "green", 12, "promoted"),
    "refused": ("x", "red", 6, "not promoted"),
    "lost": ("D", "orange", 5, "lost its swap"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshLine:
    """How the model that was in use did on each night's new records, before any was trained on them."""

    night: FreshNight
    in_use: float | None
    """Nats a token; None: it was not scored."""
    others: Sequence[float]
    """Of challengers that waited."""


def moment_of(text: str) -> datetime:
    """In UTC unless it says otherwise; what is none stands at the beginning of time rather than at no place."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return datetime(1970, 1, 1, tzinfo=UTC)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def nights_drawing(nights: Sequence[Night]) -> Markup:
    """Each night's model, the one in use, and what came of it."""
    at = [moment_of(each.time) for each in nights]

    def draw(axes: Any) -> None:
        in_use = [each.champion_loss for each in nights]
        smaller = 1.0 if len(nights) <= _MANY else 0.6
        axes.plot(
            at,
            in_use,
            color=COLOURS["grey"],
            linewidth=1.4,
            marker="." if len(nights) == 1 else None,
            label="in use",
            drawstyle="steps-post",
        )
        for outcome, (marker, colour, size, says) in _MARKS.items():
            some = [place for place, each in enumerate(nights) if each.outcome == outcome]
            if some:
                axes.plot(
                    [at[place] for place in some],
                    [nights[place].challenger_loss for place in some],
                    color=COLOURS[colour],
                    marker=marker,
                    markersize=size * smaller,
                    linestyle="none",
                    label=says,
                )
        _loss_axis(axes, [*in_use, *(each.challenger_loss for each in nights)])
        _dates(axes, at)

    promoted = sum(each.outcome == "promoted" for each in nights)
    says = (
        f"{len(nights):,} nights, {promoted:,} promoted. Loss on the frozen examples of the model in use: from "
        f"{nights[0].champion_loss:.4f} to {nights[-1].champion_loss:.4f}."
    )
    return wide("nights", draw, says)


def fresh_drawing(lines: Sequence[FreshLine]) -> Markup:
    """Losses on new records."""
    at = [moment_of(each.night.time) for each in lines]

    def draw(axes: Any) -> None:
        known = [(when, each.in_use) for when, each in zip(at, lines, strict=True) if each.in_use is not None]
        axes.plot(*zip(*known, strict=True), color=COLOURS["blue"], marker="o", markersize=3.5, label="in use")
        others = [(when, loss) for when, each in zip(at, lines, strict=True) for loss in each.others]
        if others:
            axes.plot(
                *zip(*others, strict=True),
                color=COLOURS["orange"],
                marker="x",
                markersize=5,
                linestyle="none",
                label="challengers that waited",
            )
        _loss_axis(axes, [loss for _, loss in (*known, *others)])
        _dates(axes, at)

    found = [each.in_use for each in lines if each.in_use is not None]
    return svg("fresh", draw, f"Loss of the model in use on new records: from {found[0]:.4f} to {found[-1]:.4f}.")


def budget_drawing(spent: Sequence[Spent], per_year: float, *, today: int) -> Markup:
    """What was spent in the year before each day, and what may be."""
    first = min((each.day for each in spent), default=today)
    days = range(first, max(today, first) + 1)
    changes = {first, today}
    for each in spent:
        changes |= {each.day, each.day + YEAR_DAYS}
    shown = [day for day in sorted(changes) if day in days]
    sums = [sum(each.level for each in spent if day - YEAR_DAYS < each.day <= day) for day in shown]

    def draw(axes: Any) -> None:
        at = [_day(day) for day in shown]
        axes.plot(at, sums, color=COLOURS["blue"], linewidth=1.6, drawstyle="steps-post", label="spent in 365 days")
        axes.axhline(per_year, color=COLOURS["red"], linestyle="--", linewidth=1.2, label="may be spent")
        axes.set_ylabel("expected wrong promotions")
        axes.set_ylim(0, 1.15 * max(per_year, *sums))
        axes.legend(frameon=False, loc="best")
        _dates(axes, at)

    return svg(
        "budget", draw, f"{sums[-1]:.3f} of {per_year:g} expected wrong promotions are spent in {YEAR_DAYS} days."
    )


def work_drawing(nights: Sequence[Night]) -> Markup:
    """GPU hours of each night that trained, and how many of them were training steps."""
    worked = [(moment_of(each.time), each.work) for each in nights if each.work is not None]
    at = [when for when, _ in worked]
    held = [work.held_seconds * work.ranks / _HOUR for _, work in worked]
    trained = [min(work.train_seconds, work.held_seconds) * work.ranks / _HOUR for _, work in worked]

    def draw(axes: Any) -> None:
        width = _bar_width(at)
        axes.bar(at, held, width=width, color=COLOURS["grey"], label="held", alpha=0.5)
        axes.bar(at, trained, width=width, color=COLOURS["green"], label="in training steps")
        axes.set_ylabel("GPU hours")
        axes.set_ylim(0, 1.25 * max([*held, 1e-6]))
        axes.legend(frameon=False, loc="best")
        _dates(axes, at)

    return svg("work", draw, f"{sum(held):.3g} GPU hours were held, {sum(trained):.3g} of them in training steps.")


def _bar_width(at: Sequence[datetime]) -> timedelta:
    """A little less than the shortest time between two nights, and never more than a day's."""
    between = [later - earlier for earlier, later in pairwise(at) if later > earlier]
    return min([timedelta(days=1), *between]) * 0.8


def _loss_axis(axes: Any, losses: Sequence[float]) -> None:
    low, high = min(losses), max(losses)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)
    axes.set_ylabel("nats a token")
    axes.legend(frameon=False, loc="best")


def _day(day: int) -> datetime:
    return datetime.combine(date.fromordinal(max(1, day)), datetime.min.time(), tzinfo=UTC)


def _dates(axes: Any, at: Sequence[datetime]) -> None:
    """As many days by their date as have room."""
    most = int(axes.figure.get_figwidth() / _INCHES_A_DATE)
    days = sorted({datetime.combine(each.date(), datetime.min.time(), tzinfo=UTC) for each in at})
    step = -(-len(days) // most)
    shown = days[::-1][::step][::-1]
    axes.set_xticks(shown, [each.date().isoformat() for each in shown])
    if len(days) == 1:
        axes.set_xlim(days[0] - timedelta(days=1), days[0] + timedelta(days=2))
