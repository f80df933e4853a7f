"""What a person sees of a channel and of a night on it."""

from channel_material import STANDARDS, exam, judged

from job.core.attempt.run_record import RecordedParent
from job.core.nightly.channel import (
    FreshNight,
    after_verdict,
    open_state,
    promotion_of,
    rollback_to,
)
from job.core.nightly.error_budget import spend
from job.core.nightly.judgement import evidence_to_gather
from job.core.nightly.promotion_report import BudgetReport, NewData, PromotionReport, said_of
from job.render.channel_text import channel_lines, promotion_lines
from job.render.report_text import report_lines

DAY = 740_000


def night(verdict, outcome="promoted", **more):
    return PromotionReport(
        channel="notes",
        channel_uri="s3://b/channels/notes",
        outcome=outcome,
        said=said_of(verdict, outcome),
        judged=verdict,
        budget=BudgetReport(per_year=1.0, spent_in_a_year=0.25, left=0.01, tests=9),
        new=NewData(files=("s3://b/a.jsonl",), file_count=5, bytes=1234, records=17, unseen=5),
        **more,
    )


def test_a_report_says_first_what_came_of_the_night_and_why(report):
    south = tuple(range(0, 100, 4))
    verdict = judged(gain=0.5, exam_of=exam(slices={"town=south": south}), worse=south)
    parent = RecordedParent(run_id="run-1", sequence=3, weights="a" * 64)
    found = night(verdict, "refused", late=("s3://b/x.jsonl: it is empty",), parent=parent)
    lines = report_lines(report.model_copy(update={"promotion": found}))

    assert lines[2].startswith("channel            notes: Not promoted: run-2 is ")
    text = "\n".join(lines)
    assert "slice town=south" in text
    assert (
        "new data           5 files, 1,234 bytes, 17 examples that the model in use has not seen, 5 that no run of the "
        "channel has: s3://b/a.jsonl"
    ) in text
    assert "left out           s3://b/x.jsonl: it is empty" in text
    assert "started from       run-1" in text
    assert "validation loss    run-1 " in text
    assert "0.250 of 1 wrong promotions spent" in text
    assert promotion_lines(None) == []


def test_a_channel_shows_what_is_in_use_why_and_how_it_came_to_be():
    verdict = judged(gain=0.1)
    refused = judged("run-3", gain=0.0)
    first = promotion_of(verdict, channel="notes", time="2026-11-28T02:17:00+00:00", by="node")
    back = rollback_to(None, first, time="2026-11-29T10:00:00+00:00", by="desk")
    state = open_state(DAY, per_year=1.0)
    state = state.model_copy(update={"budget": spend(state.budget, "run-2", DAY, per_year=1.0)[0]})
    state = after_verdict(state, verdict, "promoted", champion="run-1", waits=None)
    waits = evidence_to_gather(refused, STANDARDS, level=refused.level)
    state = after_verdict(state, refused, "refused", champion="run-1", waits=waits)
    fresh = FreshNight(night="n", time="2026-11-29T02:17:00+00:00", records=40, losses={"run-1": 1.25})
    state = state.model_copy(update={"again": ("run-4",), "fresh": (fresh,)})

    lines = channel_lines("s3://b/channels/notes", [first], state, today=DAY, is_current=True)
    text = "\n".join(lines)
    assert "in use    run-2, since 2026-11-28T02:17:00+00:00" in text
    assert "why       Promoted: run-2 is " in text
    assert "copy      s3://b/channels/notes/adapter" in text
    assert "budget    0.002 of 1 wrong promotions" in text
    assert "again     run-4 lost its swap" in text
    assert "40 records: run-1 1.2500" in text
    assert text.index("run-3  ") < text.rindex("run-2  "), "the newest night first"
    assert "cannot tell" in text

    lines = channel_lines("s3://b/channels/notes", [back, first], None, today=DAY, is_current=False)
    assert lines[2] == "in use    the base, since 2026-11-29T10:00:00+00:00"
    assert lines[-2].endswith("Rolled back by hand from run-2 to the base.")
    assert channel_lines("u", [], None, today=DAY, is_current=True)[2] == "in use    the base: nothing was promoted yet"
