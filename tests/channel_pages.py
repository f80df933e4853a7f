"""Channels and nights for pages: usual ones, and those that are long, hostile or nearly empty."""

from datetime import UTC, date, datetime, timedelta

from channel_material import exam, judged, results
from page_reports import gsm8k, small

from job.core.attempt.run_record import RecordedParent
from job.core.judging.held_out import Answer
from job.core.nightly.channel import (
    KEPT_NIGHTS,
    FreshNight,
    Night,
    NightWork,
    open_state,
    promotion_of,
    rollback_to,
)
from job.core.nightly.error_budget import spend
from job.core.nightly.exam_results import given_answers, results_of
from job.core.nightly.fresh_evidence import FreshEvidence
from job.core.nightly.judgement import Answered
from job.core.nightly.promotion_report import BudgetReport, NewData, PromotionReport, said_of
from job.render.page.nights.channel import ChannelSeen

FIRST = date(2026, 1, 5)
URI = "s3://models/notes/channels/notes"


def moment(night, hour=2):
    return (datetime.combine(FIRST, datetime.min.time(), tzinfo=UTC) + timedelta(days=night, hours=hour)).isoformat()


def a_channel(nights=40, *, words="run", every=6, again=()):
    """A channel on which every so many nights something better came; `words`: in each name and sentence."""
    state, changes, loss = open_state(FIRST.toordinal(), per_year=1.0), [], 1.6
    in_use = "the base"
    for number in range(nights):
        run_id, day = f"{words}-{number}", FIRST.toordinal() + number
        promoted = number % every == 0
        mine = loss - 0.03 if promoted else loss + 0.004 * (number % 5 - 1)
        state = state.model_copy(update={"budget": spend(state.budget, run_id, day, per_year=1.0)[0]})
        night = Night(
            run_id=run_id,
            run_uri=f"s3://models/notes/runs/{run_id}",
            round=1,
            time=moment(number),
            champion=in_use,
            outcome="promoted" if promoted else "lost" if number % 11 == 10 else "refused",
            verdict="better" if promoted else "cannot tell",
            why=f"{run_id} is {loss - mine:.4f} nat a token better than {in_use}.",
            level=0.004,
            challenger_loss=mine,
            champion_loss=loss,
            mean=mine - loss,
            low=mine - loss - 0.01,
            high=mine - loss + 0.01,
            work=NightWork(
                device="NVIDIA H200",
                attempts=1 + number % 7 // 6,
                held_seconds=2400.0 + 60 * (number % 5),
                train_seconds=1900.0,
                tokens=4_000_000 + number,
                ranks=2,
            ),
        )
        fresh = FreshNight(night=f"n{number}", time=moment(number, 1), records=300, losses={in_use: loss + 0.02})
        state = state.model_copy(update={"nights": (*state.nights, night)[-KEPT_NIGHTS:]})
        if in_use != "the base":
            state = state.model_copy(update={"fresh": (*state.fresh, fresh)[-KEPT_NIGHTS:]})
        if promoted:
            verdict = judged(run_id)
            new = promotion_of(verdict, channel="notes", time=moment(number, 3), by="node")
            update = {"sequence": len(changes) + 1, "replaced": None if not changes else in_use, "why": night.why}
            changes.append(new.model_copy(update=update))
            in_use, loss = run_id, mine
    waits = FreshEvidence(challenger=f"{words}-w", champion=in_use, level=0.002, records=420, nights=("a",))
    state = state.model_copy(update={"waiting": (waits,), "again": tuple(again)})
    return ChannelSeen(uri=URI, changes=changes[::-1], state=state, today=FIRST.toordinal() + nights, is_current=True)


def an_empty_channel():
    return ChannelSeen(uri=URI, changes=(), state=None, today=FIRST.toordinal(), is_current=True)


def a_rolled_back_channel():
    """To the base, on its first day."""
    before = a_channel(1)
    back = rollback_to(None, before.changes[0], time=moment(1), by="desk")
    return ChannelSeen(
        uri=URI, changes=(back, *before.changes), state=before.state, today=before.today, is_current=False
    )


CHANNELS = {
    "forty nights": a_channel,
    "a year and more": lambda: a_channel(500),
    "one night": lambda: a_channel(1),
    "empty": an_empty_channel,
    "rolled back": a_rolled_back_channel,
    "hostile": lambda: a_channel(9, words="<script>alert(1)</script>&\u202e'\"", again=("<b>",)),
    "long names": lambda: a_channel(30, words="w" * 5000),
}


def with_wrong(kept, wrong):
    """The same results with answers."""
    answers = given_answers("q", [*range(len(wrong))], wrong, [])
    return results_of(kept.nll, model=kept.model, exam=kept.exam, how=kept.how, answers=answers)


def a_verdict(*, lost=3, asked=40, gain=0.1, run_id="run-2", slices=("language=en", "language=de")):
    """A better loss on most slices, and some answers that the model in use gave better."""
    of = {name: tuple(range(place, 100, len(slices))) for place, name in enumerate(slices)}
    theirs = with_wrong(results(1.0, model="run-1"), [0.0] * asked)
    mine = with_wrong(results(1.0 - gain, model=run_id, seed=2), [1.0] * lost + [0.0] * (asked - lost))
    regression = Answered(
        exam=exam(name="r"),
        challenger=results(1.0, model=run_id, on="r"),
        champion=results(1.0, model="run-1", on="r", seed=4),
        earlier={"the base": results(1.4, model="base", on="r")},
    )
    return judged(run_id, exam_of=exam(slices=of), challenger=mine, champion=theirs, regression=regression)


def a_night(verdict=None, outcome="promoted", *, report=None, words="", **more):
    """A report with what came of the run on its channel."""
    verdict = verdict or a_verdict()
    found = PromotionReport(
        channel="notes",
        channel_uri=URI,
        outcome=outcome,
        said=said_of(verdict, outcome) + words,
        judged=verdict,
        budget=BudgetReport(per_year=1.0, spent_in_a_year=0.25, left=0.01, tests=9),
        new=NewData(files=(f"s3://b/a{words}.jsonl",), file_count=25, bytes=1234, records=17, unseen=5),
        late=(f"s3://b/x.jsonl{words}: it is empty",),
        also=(f"Promoted: run-0{words} is better.",),
        parent=RecordedParent(run_id="run-1", sequence=3, weights="a" * 64),
        **more,
    )
    answers = tuple(
        Answer(
            prompt=f"How many in all? ({n}){words}",
            expected="#### 72",
            base="I do not know.",
            champion=f"#### 72{words}",
            tuned="#### 72" if n % 10 else "#### 71",
            where=f"test.jsonl:{n + 1}",
            base_loss=1.25,
            tuned_loss=0.4 + n / 100,
            base_score=0.0,
            champion_score=1.0 if n < 20 else 0.0,
            tuned_score=1.0 if n % 10 else 0.0,
        )
        for n in range(30)
    )
    return (report or gsm8k()).model_copy(update={"promotion": found, "answers": answers})


NIGHTS = {
    "promoted": a_night,
    "refused": lambda: a_night(judged(gain=-0.2), "refused"),
    "lost": lambda: a_night(outcome="lost", conditional=False, fresh_promotion="run-0"),
    "hostile": lambda: a_night(
        a_verdict(run_id="<script>", slices=("<b>=1", "&=\u202e")), words="<script>alert(1)</script>\u202e"
    ),
    "of a small run": lambda: a_night(report=small()),
}
