"""What a run took: time over all attempts and how much of it was useful, speed, the way to the first step."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from job.core.lines import worth_naming
from job.core.reports.report import AttemptReport, Report, Throughput
from job.render.ceiling_text import ceiling_words
from job.render.page.blocks import Block, Chapter, Facts, Room, Table

_HOUR = 3600


def cost_chapter(report: Report, room: Room) -> Chapter:
    """All of it."""
    speed = report.throughput
    facts = {
        "device": room.cut(report.device),
        **_hours(report),
        "speed": f"{speed.tokens_per_second:,.0f} real tokens a second, median step {speed.step_seconds_median:.3g} s",
        **_together(speed),
        **({} if (share := ceiling_words(speed)) is None else {"share of the ceiling": share}),
        "trained on": f"{speed.tokens:,} real tokens in {speed.seconds:,.0f} s",
        "peak memory": _memory(report),
        "engine": room.cut(f"{report.plan.engine}: {report.plan.engine_reason}".removesuffix(": ")),
        "micro-batch": room.cut(f"{report.plan.micro_batch_tokens:,} tokens; {report.plan.reason}".removesuffix("; ")),
    }
    blocks: list[Block] = [Facts(facts=facts)]
    if report.start is not None:
        name = f"The way to the first step, {seconds_text(report.start.seconds)}"
        blocks.append(_parts(name, report.start.spent, room))
    blocks.append(_parts("This attempt's time", speed.phase_seconds, room))
    blocks.append(attempts_table(report.attempts, room))
    return Chapter(anchor="cost", name="Cost", blocks=blocks)


def _together(speed: Throughput) -> dict[str, str]:
    """How the processes of a run worked together, where there were several."""
    if speed.ranks == 1:
        return {}
    nodes = f" on {speed.nodes:,} nodes" if speed.nodes > 1 else ""
    base = "the base sharded over them" if speed.placement == "sharded" else "each with the whole base"
    return {
        "by": f"{speed.ranks:,} processes{nodes}, {base}",
        "speed of each": f"{speed.tokens_per_second_a_rank:,.0f} real tokens a second",
        "waited for others": f"{seconds_text(speed.waited_seconds)} of this attempt's steps, each on the average",
        "sent to others": f"{speed.bytes_a_step / 1e6:,.1f} MB a step by each",
    }


def _hours(report: Report) -> dict[str, str]:
    """Time over all attempts, on all GPUs, and the share of it that trained; in bounds where an attempt was killed."""
    attempts = report.attempts
    least = [_at_least(each) for each in attempts]
    if sum(least) <= 0:
        return {}
    silent = sum(_took(each) is None for each in attempts)
    at_least = "at least " if silent else ""
    named = "1 attempt" if len(attempts) == 1 else f"{len(attempts):,} attempts"
    killed = f", of which {silent:,} left no word of their end" if silent else ""
    shown = {"time on the device": f"{at_least}{seconds_text(sum(least))} in {named}{killed}"}
    if not report.device.startswith("CPU"):
        own = report.throughput.ranks
        hours = sum(took * (each.ranks or own) for each, took in zip(attempts, least, strict=True)) / _HOUR
        unknown = sum(each.ranks is None for each in attempts[:-1])
        counted = f"; the number of GPUs of {unknown:,} of them is not recorded, and taken to be {own:,}"
        shown["GPU hours"] = f"{at_least}{hours:{',.2f' if hours >= 1 else '.3g'}}{counted if unknown else ''}"
    useful = _useful(report, sum(least))
    return shown if useful is None else shown | {"useful of it": useful}


def _useful(report: Report, least: float) -> str | None:
    """The share of the time that trained, within bounds; None: it cannot be."""
    most = [_at_most(each, following) for each, following in _followed(report.attempts)]
    known, trained = [each for each in most if each is not None], report.throughput.seconds
    high, what = f"{min(1.0, trained / least):.0%}", "in training steps (goodput)"
    if len(known) < len(most):
        return f"at most {high} {what}"
    if trained > sum(known):
        return None
    low = f"{trained / sum(known):.0%}"
    if low == high:
        return f"{low} {what}"
    return f"{low} to {high} {what}; one that left no word ended when the next began, at the latest"


def _followed(attempts: Sequence[AttemptReport]) -> list[tuple[AttemptReport, AttemptReport | None]]:
    """Each attempt with the one after it."""
    return [*zip(attempts, [*attempts[1:], None], strict=True)]


def _at_least(attempt: AttemptReport) -> float:
    took = _took(attempt)
    return float(attempt.lasted_at_least or 0) if took is None else took


def _at_most(attempt: AttemptReport, following: AttemptReport | None) -> float | None:
    """One that left no word had fallen silent when the next one began; None: nobody knows when that was."""
    if _took(attempt) is not None:
        return _at_least(attempt)
    began, ended = _moment(attempt.started), None if following is None else _moment(following.started)
    return None if began is None or ended is None else max(_at_least(attempt), (ended - began).total_seconds())


def _took(attempt: AttemptReport) -> float | None:
    began, ended = _moment(attempt.started), _moment(attempt.ended)
    return None if began is None or ended is None else max(0.0, (ended - began).total_seconds())


def _moment(text: str | None) -> datetime | None:
    try:
        moment = None if text is None else datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)


def moment(text: str) -> str:
    """A time of a report as people read it, to the minute: it is in UTC."""
    return f"{text[:16].replace('T', ' ')} UTC"


def _memory(report: Report) -> str:
    predicted = report.plan.predicted_peak_bytes
    planned = "" if predicted is None else f", {predicted / 2**30:.2f} GiB planned"
    return f"{report.throughput.peak_memory_bytes / 2**30:.2f} GiB{planned}"


def _parts(name: str, spent: Mapping[str, float], room: Room) -> Block:
    """The longest first."""
    total = sum(spent.values())
    parts = worth_naming(spent)
    shown = [*parts.items()][: room.rows]
    rows = [
        (room.cut(part.replace("_", " ")), seconds_text(took), f"{took / total:.0%}" if total > 0 else "-")
        for part, took in shown
    ]
    return Table(caption=name, head=("phase", "time", "share"), rows=rows, left_out=len(parts) - len(shown))


def seconds_text(seconds: float) -> str:
    """A time as people read it."""
    if seconds >= _HOUR:
        return f"{seconds / _HOUR:,.2f} h"
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.1f} s"  # noqa: PLR2004 - beyond it tenths say nothing


def attempts_table(attempts: Sequence[AttemptReport], room: Room) -> Table:
    """Who worked on the run and why each ended; the last ones where there is no room for all."""
    shown = attempts[-room.rows :]
    rows = [
        (
            f"{each.number}",
            room.cut(each.started[:19].replace("T", " ")),
            _took_text(each),
            room.cut(each.host),
            _steps(each),
            "-" if each.exit_code is None else str(each.exit_code),
            room.cut(each.reason),
        )
        for each in shown
    ]
    head = ("attempt", "started (UTC)", "took", "host", "steps", "exit", "why it ended")
    return Table(caption="Attempts", head=head, rows=rows, words=(1, 3, 6), left_out=len(attempts) - len(shown))


def _took_text(attempt: AttemptReport) -> str:
    if (took := _took(attempt)) is not None:
        return seconds_text(took)
    return f"at least {seconds_text(attempt.lasted_at_least)}" if attempt.lasted_at_least else "-"


def _steps(attempt: AttemptReport) -> str:
    if attempt.from_step is None or attempt.last_committed_step is None:
        return "-"
    return f"{attempt.from_step:,} to {attempt.last_committed_step:,}"
