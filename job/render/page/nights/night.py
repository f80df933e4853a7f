"""What a page says of a night on a channel: the model beside the one in use, with intervals, and what was guarded."""

from collections.abc import Iterator, Sequence

from job.core.judging.paired import Gap
from job.core.nightly.error_budget import YEAR_DAYS
from job.core.nightly.promotion_report import BudgetReport, NewData, PromotionReport
from job.render.page.blocks import Block, Chapter, Facts, Listing, Room, Table, Words

_HEAD = ("on", "n", "clusters", "difference", "95 %", "p (worse)")


def night_chapter(promotion: PromotionReport | None, room: Room) -> Chapter | None:
    """What came of the run on its channel; None: its recipe names none."""
    if promotion is None:
        return None
    judged = promotion.judged
    decision = judged.decision
    champion = room.cut(decision.champion)
    said = [*decision.reasons[1:], *decision.notes]
    blocks: list[Block] = [
        *([Listing(items=[room.cut(each) for each in said])] if said else []),
        Facts(
            facts={
                "on the frozen examples": f"{champion} {judged.champion_loss:.4f}, this run "
                f"{judged.challenger_loss:.4f} nats a token",
                "verdict": f"{decision.verdict}; {_outcome(promotion)}",
                **_facts(promotion, room),
            }
        ),
        *_differences(promotion, champion, room),
    ]
    return Chapter(anchor="night", name="Night", blocks=[*blocks, *_lists(promotion, room)])


def _outcome(promotion: PromotionReport) -> str:
    match promotion.outcome:
        case "promoted" if promotion.replaced_by is not None:
            return f"it was put in use, and is no longer: {promotion.replaced_by[:200]} is"
        case "promoted":
            return "it was put in use"
        case "lost":
            return "what it was compared with was in use no longer, and it is judged again next night"
        case _:
            return f"{promotion.judged.decision.champion[:200]} stays in use"


def _facts(promotion: PromotionReport, room: Room) -> dict[str, str]:
    judged = promotion.judged
    facts = {
        "channel": room.cut(promotion.channel_uri),
        "tonight's level": f"{judged.decision.level:.2g}",
        "error budget": budget_text(promotion.budget),
        "new data": _new_text(promotion.new),
        "started from": "the base" if promotion.parent is None else room.cut(promotion.parent.run_id),
    }
    if judged.round > 1:
        facts["judged"] = f"for the {judged.round}. time"
    if promotion.fresh_promotion is not None:
        facts["before training"] = f"{room.cut(promotion.fresh_promotion)} was promoted by tonight's new records"
    if not promotion.conditional:
        facts["store"] = (
            "keeps no conditions on writes: two that swap in the same two seconds may both think they won, and one "
            "that stands still while it writes may undo what another has paid"
        )
    return facts


def budget_text(budget: BudgetReport) -> str:
    """What was spent of it."""
    return (
        f"{budget.spent_in_a_year:.3f} of {budget.per_year:g} wrong promotions spent in {YEAR_DAYS} days, "
        f"{budget.left:.4f} saved, {budget.tests:,} tests"
    )


def _new_text(new: NewData) -> str:
    said = f"{new.file_count:,} files, {new.bytes:,} bytes"
    if new.records is not None:
        said += f", {new.records:,} examples that the model in use has not seen"
    return said if new.unseen is None else f"{said}, {new.unseen:,} that no run of the channel has"


def _differences(promotion: PromotionReport, champion: str, room: Room) -> Iterator[Table]:
    """This run less another model; one table in nats, one of answers."""
    judged = promotion.judged
    against = {"frozen examples": judged.gap} | {f"slice {name}": gap for name, gap in judged.slices.items()}
    if judged.regression is not None:
        against["regression set"] = judged.regression
    against |= {f"drift, against {name}": gap for name, gap in judged.drift.items()}
    if len(judged.seeds) > 1:
        against |= {f"seed {number}": gap for number, gap in enumerate(judged.seeds, start=1)}
    rows = [(room.cut(name), *_cells(gap, f"{gap.mean:+.4f}", _interval(gap, 1, 4))) for name, gap in against.items()]
    yield Table(
        caption=f"This run less {champion}, in nats a token: below 0 this run is better",
        head=_HEAD,
        rows=rows[: room.rows],
        left_out=len(rows) - len(rows[: room.rows]),
    )
    if judged.answers is not None:
        gap = judged.answers
        rows = [("frozen examples", *_cells(gap, f"{100 * gap.mean:+.1f}", _interval(gap, 100, 1)))]
        caption = (
            f"Wrong answers of this run less those of {champion}, in points of a hundred: below 0 this run is better"
        )
        yield Table(caption=caption, head=_HEAD, rows=rows)


def _cells(gap: Gap, mean: str, interval: str) -> Sequence[str]:
    chance = "-" if gap.standard_error is None else f"{gap.p_worse:.2g}"
    return f"{gap.examples:,}", f"{gap.clusters:,}", "the same" if gap.identical else mean, interval, chance


def _interval(gap: Gap, times: int, digits: int) -> str:
    if gap.low is None or gap.high is None:
        return "-"
    return f"{times * gap.low:+.{digits}f} to {times * gap.high:+.{digits}f}"


def _lists(promotion: PromotionReport, room: Room) -> Iterator[Block]:
    named = {
        "New files:": (promotion.new.files, promotion.new.file_count),
        "Left out, because they were not whole yet:": (promotion.late, len(promotion.late)),
        "What came tonight of other runs:": (promotion.also, len(promotion.also)),
    }
    for name, (items, count) in named.items():
        if items:
            shown = [room.cut(each) for each in items[: room.rows]]
            yield Words(text=name)
            yield Listing(items=shown, left_out=count - len(shown))
