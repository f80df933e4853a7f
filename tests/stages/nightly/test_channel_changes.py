"""What is done to a channel: which models a challenger must not lie below, and by what a run is judged again."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from channel_material import HOW, adapter, exam, judged, results

from job.core.nightly.channel import Compared, Promoted, promotion_of, rollback_to
from job.core.nightly.exam_results import given_answers, results_of
from job.core.recipe.schema import Recipe
from job.edge.run.channels import Channel
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.stages.nightly.channel_changes import BASE, FIRST, MONTH_AGO, carry_out, earlier_models, judge_by_kept
from job.stages.nightly.comparing import again as candidate_again


@pytest.fixture
def channel(tmp_path):
    return Channel(open_store(f"file://{tmp_path}/store", StoreSettings()), "notes", conditional=True)


def days_ago(days):
    return (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")


def in_use_for(channel, days, run_id):
    """A change so many days ago."""
    now, etag = channel.promoted()
    change = Promoted(
        channel="notes",
        sequence=1 if now is None else now.sequence + 1,
        kind="promotion",
        run_id=run_id,
        run_uri=f"s3://b/runs/{run_id}",
        adapter=adapter(run_id),
        base="owner/base",
        revision="c" * 40,
        since=days_ago(days),
        why="Promoted.",
        replaced=None if now is None else now.run_id,
        by="node",
    )
    assert channel.swap(change, etag=etag)
    return change


def test_nothing_that_was_promoted_lies_below_the_base(channel):
    assert earlier_models(channel, None) == {}
    first = in_use_for(channel, 3, "run-1")
    assert earlier_models(channel, first) == {"the base": None}


def test_small_steps_down_are_seen_on_a_young_channel_too(channel):
    """Twelve in twelve nights: no champion is 30 days old, and the first one is what the sum is seen by."""
    changes = [in_use_for(channel, 12 - night, f"run-{night}") for night in range(12)]

    assert earlier_models(channel, changes[-1]) == {"the base": None, FIRST: changes[0]}


def test_later_it_is_the_champion_of_thirty_days_ago(channel):
    changes = [in_use_for(channel, days, f"run-{days}") for days in (50, 40, 20, 2)]

    assert earlier_models(channel, changes[-1]) == {"the base": None, MONTH_AGO: changes[1]}


def test_what_was_put_in_use_and_rolled_back_before_it_is_carried_out_again_is_no_longer_in_use(channel, recipe):
    """As where the process was killed after the swap, and somebody went back before the next start."""
    first = in_use_for(channel, 1, "run-1")
    copy = SimpleNamespace(follow=lambda: None)
    compared = Compared(run_id="run-1", sequence=1, etag=channel.promoted()[1])
    better = judged("run-2", gain=0.5, compared=compared)
    better = better.model_copy(update={"adapter": adapter("run-2", "b")})
    done = carry_out(channel, recipe, better, copy)
    assert (done.outcome, done.replaced_by, done.said) == ("promoted", None, better.decision.reasons[0])

    now, etag = channel.promoted()
    assert channel.swap(rollback_to(first, now, time="2026-11-30T00:00:00+00:00", by="node"), etag=etag)
    again = carry_out(channel, recipe, better, copy)
    assert (again.outcome, again.replaced_by) == ("promoted", "run-1")
    assert again.said.startswith("Promoted, and no longer in use, since run-1 was put in its place: run-2 is 0.5")
    assert channel.promoted()[0].run_id == "run-1"
    assert len(channel.state()[0].nights) == 1

    now, etag = channel.promoted()
    back = promotion_of(better, channel="notes", time="2026-11-30T01:00:00+00:00", by="node")
    assert channel.swap(rollback_to(back, now, time="2026-11-30T01:00:00+00:00", by="node"), etag=etag)
    assert carry_out(channel, recipe, better, copy).replaced_by is None, "it was gone back to"


def back_to(channel, days, target):
    """A rollback so many days ago; None: to the base."""
    now, etag = channel.promoted()
    change = rollback_to(target, now, time=days_ago(days), by="node")
    assert channel.swap(change, etag=etag)
    return change


def test_what_was_rolled_back_from_is_no_standard_though_it_was_in_use_thirty_days_ago(channel):
    good, low, bad = (in_use_for(channel, days, f"run-{days}") for days in (60, 40, 10))
    assert earlier_models(channel, bad)[MONTH_AGO] == low
    back = back_to(channel, 5, good)
    assert earlier_models(channel, back) == {"the base": None}, "both that came after it are taken back"
    newer = in_use_for(channel, 2, "run-2")
    assert earlier_models(channel, newer) == {"the base": None, MONTH_AGO: good}
    again = back_to(channel, 1, low)
    assert earlier_models(channel, again) == {"the base": None}, "it stands again, as what stood before it"


def test_while_the_base_is_in_use_the_model_before_it_is_a_standard_unless_that_was_rolled_back_from(channel):
    """To switch adapters off is no reason to forget what users had a month ago."""
    good, bad = in_use_for(channel, 60, "run-60"), in_use_for(channel, 10, "run-10")
    base = back_to(channel, 5, None)
    assert base.run_id is None
    assert earlier_models(channel, base) == {MONTH_AGO: good}
    back_to(channel, 4, bad)
    back_to(channel, 3, good)
    assert earlier_models(channel, back_to(channel, 2, None)) == {}, "now both were rolled back from"
    assert earlier_models(channel, in_use_for(channel, 1, "run-1")) == {"the base": None}


def test_a_base_that_has_been_in_use_for_a_month_is_the_standard_itself(channel):
    in_use_for(channel, 60, "run-60")
    in_use_for(channel, 50, "run-50")
    assert earlier_models(channel, back_to(channel, 40, None)) == {}
    assert earlier_models(channel, in_use_for(channel, 3, "run-3")) == {"the base": None}


# --- judged again by what is kept ------------------------------------------------------------------------------------


@pytest.fixture
def recipe():
    return Recipe.model_validate(
        {
            "model": {"base": "owner/base", "revision": "c" * 40},
            "data": {"train": "s3://b/t.jsonl", "validation": "s3://b/v.jsonl", "prompt": "{q}", "completion": "{a}"},
            "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-4},
            "output": "s3://b/models",
            "promote": {"channel": "notes", "seeds": 2},
        }
    )


def kept(channel, run_id, loss, seed):
    model = BASE if run_id == BASE else adapter(run_id).files["adapter_model.safetensors"].sha256[:32]
    channel.keep_results(run_id, results(loss, model=model, seed=seed))


def test_of_two_seeds_both_are_judged_again(channel, recipe):
    """The one alone would be promoted; the other is no better than what is in use now."""
    in_use_for(channel, 1, "run-1")
    channel.keep_exam(exam())
    for seed, (run_id, loss) in enumerate({BASE: 2.0, "run-1": 1.0, "run-2": 0.5}.items()):
        kept(channel, run_id, loss, seed)
    before = judged(gain=0.5, seeds=(0.5,), checkpoints=7)
    assert before.how == HOW

    assert judge_by_kept(channel, recipe, before, number=2) is None, "nothing is kept of the other training"
    kept(channel, "seed0.5", 1.0, 9)
    again = judge_by_kept(channel, recipe, before, number=2)

    assert len(again.seeds) == 2
    assert again.others == before.others
    assert again.checkpoints == candidate_again(before, 2).checkpoints == 7, "the level is shared out anew"
    assert not again.decision.promoted
    assert again.decision.champion == "run-1"


def answered(channel, run_id, *, asked="q", wrong=0.0):
    """Keep what a run answered as well."""
    before = channel.results(run_id, exam="exam", how=HOW, model="a" * 32)
    answers = given_answers(asked, [*range(30)], [wrong] * 30, [])
    again = results_of(before.nll, model=before.model, exam="exam", how=HOW, answers=answers)
    channel.keep_results(run_id, again)


def test_answers_are_compared_again_too_and_those_to_other_questions_wait_for_a_night_that_asks(channel, recipe):
    recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"answers": 30})})
    in_use_for(channel, 1, "run-1")
    channel.keep_exam(exam())
    before = judged("run-2")
    for run_id, loss, seed in (("run-2", 0.9, 2), ("run-1", 1.0, 1)):
        kept(channel, run_id, loss, seed)
    channel.keep_results(BASE, results(1.2, model="base"))
    assert judge_by_kept(channel, recipe, before, number=2) is None, "neither was asked, and the recipe asks"
    answered(channel, "run-2", wrong=1.0)
    assert judge_by_kept(channel, recipe, before, number=2) is None, "one was not"
    answered(channel, "run-1", asked="others")
    assert judge_by_kept(channel, recipe, before, number=2) is None, "it was asked other questions"
    answered(channel, "run-1")
    again = judge_by_kept(channel, recipe, before, number=2)
    assert again.decision.held_up_by == ("answers",)
