"""What a channel's records say, and how its state follows a night."""

import json
from datetime import UTC, datetime

import numpy as np
import pytest
from channel_material import STANDARDS, adapter, judged
from pydantic import ValidationError

from job.core.judging.paired import pairs_of
from job.core.nightly.changes import in_use_at, not_taken_back
from job.core.nightly.channel import (
    KEPT_NIGHTS,
    ChannelState,
    Compared,
    FreshNight,
    Promoted,
    Seen,
    after_fresh,
    after_verdict,
    name_in_use,
    next_round,
    open_state,
    promotion_of,
    read_as,
    rollback_to,
    saves_tonight,
    waiting_for,
)
from job.core.nightly.error_budget import spend
from job.core.nightly.fresh_evidence import BETS, FreshEvidence
from job.core.nightly.judgement import evidence_to_gather
from job.core.nightly.promotion_report import said_of

SEEN = Seen(name="ab" * 16, records=3, templates="t")
NIGHT = FreshNight(night="n1", time="t", records=3, losses={"run-1": 1.0})


def entry(sequence=1, run_id="run-1", since="2026-11-01T00:00:00+00:00", replaced=None):
    return Promoted(
        channel="notes",
        sequence=sequence,
        kind="promotion",
        run_id=run_id,
        run_uri=f"s3://b/runs/{run_id}",
        adapter=adapter(run_id),
        base="owner/base",
        revision="c" * 40,
        since=since,
        why="Promoted.",
        replaced=replaced,
        by="node",
    )


def state():
    return open_state(740_000, per_year=1.0)


def refused(run_id="run-2", gain=0.0):
    verdict = judged(run_id, gain=gain)
    return verdict, evidence_to_gather(verdict, STANDARDS, level=verdict.level)


def test_a_promotion_is_the_next_entry_after_the_one_that_was_compared():
    new = promotion_of(judged(), channel="notes", time="t", by="node")

    assert (new.sequence, new.run_id, new.replaced, new.kind) == (2, "run-2", "run-1", "promotion")
    assert new.why.startswith("Promoted: run-2 is ")
    first = judged(compared=Compared(run_id=None, sequence=0, etag=None))
    assert promotion_of(first, channel="notes", time="t", by="node").sequence == 1


def test_going_back_is_a_change_of_its_own():
    one, two = entry(), entry(2, "run-2", replaced="run-1")
    back = rollback_to(one, two, time="t", by="node")

    assert (back.sequence, back.kind, back.run_id, back.adapter) == (3, "rollback", "run-1", one.adapter)
    base = rollback_to(None, back, time="t", by="node")
    assert (base.run_id, base.adapter, name_in_use(base)) == (None, None, "the base")
    assert name_in_use(None) == "the base"


def test_an_entry_with_a_run_and_no_adapter_is_none():
    content = json.loads(entry().model_dump_json())

    assert read_as(Promoted, content) == entry()
    with pytest.raises(ValueError, match="stand together"):
        read_as(Promoted, content | {"adapter": None})


def test_what_was_in_use_at_a_moment_and_on_a_younger_channel_the_first_that_was():
    changes = [entry(2, "run-2", since="2026-11-20T00:00:00+00:00"), entry(1, since="2026-11-01T00:00:00")]

    assert in_use_at(changes, datetime(2026, 11, 25, tzinfo=UTC)) == (changes[0], True)
    assert in_use_at(changes, datetime(2026, 11, 10, tzinfo=UTC)) == (changes[1], True)
    assert in_use_at(changes, datetime(2026, 10, 1, tzinfo=UTC)) == (changes[1], False)
    assert in_use_at([], datetime(2026, 10, 1, tzinfo=UTC)) is None


def test_a_run_that_was_gone_back_to_stands_by_that_where_its_own_entry_is_lost():
    one, two = entry(), entry(2, "run-2", replaced="run-1")
    back = rollback_to(one, two, time="2026-11-25T00:00:00+00:00", by="node")

    assert [*not_taken_back([back, two, one])] == [one]
    assert [*not_taken_back([back, two])] == [back]
    assert [*not_taken_back([two, one])] == [two, one]


def test_a_verdict_is_in_the_state_once_however_often_it_is_carried_out():
    verdict, waits = refused()
    after = after_verdict(state(), verdict, "refused", champion="run-1", waits=waits)

    assert after_verdict(after, verdict, "refused", champion="run-1", waits=waits) == after
    assert [night.run_id for night in after.nights] == ["run-2"]
    assert after.waiting == (waits,)
    assert read_as(ChannelState, json.loads(after.model_dump_json())) == after


def test_a_channel_from_before_a_night_was_one_bet_is_read_and_those_that_wait_begin_anew():
    verdict, waits = refused()
    content = json.loads(after_verdict(state(), verdict, "refused", champion="run-1", waits=waits).model_dump_json())
    (waiting,) = content["waiting"]
    waiting |= {"version": 1, "full_tokens": 24.0, "records": 300, "nights": ["a"], "better": [9.0] * 8}
    del waiting["largest"]

    assert read_as(ChannelState, content).waiting == (waits,)


def test_who_lost_its_swap_is_judged_again_and_then_no_more():
    lost = after_verdict(state(), judged(), "lost", champion="run-9", waits=None)
    assert lost.again == ("run-2",)
    assert "judged again next night" in said_of(judged(), "lost")

    again = after_verdict(lost, judged(number=2), "refused", champion="run-9", waits=None)
    assert again.again == ()
    assert [night.round for night in again.nights] == [1, 2]


def test_rounds_count_on_when_the_nights_of_a_run_that_waits_are_no_longer_kept():
    """Else its first verdict would be found again, and done again."""
    verdict, waits = refused()
    now = after_verdict(state(), verdict, "refused", champion="run-1", waits=waits)
    now = after_verdict(now, judged("run-3"), "lost", champion="run-1", waits=None)
    other = judged("other")
    for number in range(KEPT_NIGHTS):
        one = other.model_copy(update={"run_id": f"other-{number}"})
        now = after_verdict(now, one, "refused", champion="run-1", waits=None)
    assert {"run-2", "run-3"}.isdisjoint(night.run_id for night in now.nights)

    assert (next_round(now, "run-2"), next_round(now, "run-3")) == (2, 2)
    assert after_verdict(now, verdict, "refused", champion="run-1", waits=waits) == now
    assert read_as(ChannelState, json.loads(now.model_dump_json())) == now
    done = after_verdict(now, judged("run-2", number=2), "refused", champion="run-1", waits=None)
    assert done.rounds == {"run-3": 1}, "it waits no longer"
    assert next_round(done, "run-2") == 3


def test_another_champion_begins_anew_with_those_that_wait():
    verdict, waits = refused()
    after = after_verdict(state(), verdict, "refused", champion="run-1", waits=waits)
    assert waiting_for(after, "run-1") == (waits,)
    assert waiting_for(after, "run-7") == ()

    promoted = after_verdict(after, judged("run-3"), "promoted", champion="run-3", waits=None)
    assert promoted.waiting == ()


def test_those_with_the_most_evidence_wait_on():
    now = state()
    for number in range(6):
        verdict, waits = refused(f"run-{number + 2}")
        now = after_verdict(now, verdict, "refused", champion="run-1", waits=waits)

    assert [each.challenger for each in now.waiting] == ["run-5", "run-6", "run-7"]


def test_a_night_of_fresh_records_counts_once_and_only_against_the_champion_that_was_scored():
    verdict, waits = refused()
    before = after_verdict(state(), verdict, "refused", champion="run-1", waits=waits)
    pairs = pairs_of([0.0] * 50, [5.0] * 50, [10.0] * 50)
    after = after_fresh(before, {"run-2": pairs}, champion="run-1", seen=SEEN, night=NIGHT)

    assert after.waiting[0].records == 50
    assert after.waiting[0].e_better == pytest.approx(1 + np.mean(BETS)), "one bet for all of them"
    assert (after.seen, after.fresh) == (SEEN, (NIGHT,))
    assert after_fresh(after, {"run-2": pairs}, champion="run-1", seen=SEEN, night=NIGHT) == after
    other = after_fresh(before, {"run-2": pairs}, champion="run-9", seen=SEEN, night=NIGHT)
    assert other.waiting == before.waiting


def test_a_night_in_which_nobody_was_scored_only_notes_what_it_saw():
    nothing = NIGHT.model_copy(update={"losses": {}})
    after = after_fresh(state(), {}, champion="the base", seen=SEEN, night=nothing)

    assert (after.seen, after.fresh) == (SEEN, ())


def test_a_night_saves_where_new_records_speak_for_no_one():
    speaks, silent = (FreshEvidence(challenger="run-2", champion="run-1", level=0.1, last=last) for last in (-3.0, 3.0))
    heard = state().model_copy(update={"fresh": (NIGHT,)})

    assert not saves_tonight(state()), "none were ever judged on"
    assert saves_tonight(heard), "nobody waits"
    assert saves_tonight(heard.model_copy(update={"waiting": (silent,)}))
    assert not saves_tonight(heard.model_copy(update={"waiting": (silent, speaks)}))


def test_a_state_with_a_budget_that_was_spent_comes_back():
    now = state()
    budget, level = spend(now.budget, "run-2", 740_001, per_year=1.0)
    spent = now.model_copy(update={"budget": budget})

    assert level > 0
    assert read_as(ChannelState, json.loads(spent.model_dump_json())) == spent
    with pytest.raises(ValidationError):
        ChannelState(budget=budget, again=("x",) * 21)
