"""From kept results to a verdict: the same numbers give the same verdict, and no other numbers are compared."""

import json

import numpy as np
import pytest
from channel_material import HOW, STANDARDS, exam, judged, results
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from job.core.nightly.channel import Judged, read_as
from job.core.nightly.exam_results import (
    Exam,
    ExampleResults,
    answer_pairs_on,
    given_answers,
    loss_of,
    name_of,
    pairs_on,
    read_exam,
    read_results,
    results_of,
)
from job.core.nightly.fresh_evidence import BETS, FreshEvidence
from job.core.nightly.judgement import Answered, evidence_to_gather


def as_json(content):
    return json.loads(content.model_dump_json())


def test_a_verdict_comes_back_from_its_json_unchanged():
    verdict = judged()

    assert read_as(Judged, as_json(verdict)) == verdict
    with pytest.raises(ValueError, match="gap"):
        read_as(Judged, as_json(verdict) | {"gap": 1})


def test_a_clear_gain_is_promoted_none_is_not_and_each_says_by_what():
    better, same, worse = judged(gain=0.1), judged(gain=0.0), judged(gain=-0.1)

    assert (better.decision.promoted, better.decision.verdict) == (True, "better")
    assert (same.decision.promoted, same.decision.verdict) == (False, "cannot tell")
    assert (worse.decision.promoted, worse.decision.verdict) == (False, "not better")
    assert better.decision.level == pytest.approx(0.016), "a fifth of what was paid is for fresh records"
    assert better.challenger_loss == pytest.approx(better.champion_loss - 0.1, abs=0.02)
    assert any("Another seed" in note for note in better.decision.notes)


def test_a_verdict_that_is_made_again_is_the_same():
    assert judged() == judged()
    assert judged(number=2).gap != judged().gap, "another round draws other resamples"


def test_a_level_is_shared_among_the_checkpoints_of_which_one_was_chosen():
    """As many resamples are drawn as show a part of it: 20,000 would not reach below 0.00005."""
    one, many = judged(gain=0.1, level=0.002), judged(gain=0.1, level=0.002, checkpoints=50)

    assert many.decision.promoted
    assert many.gap.p_better <= 0.0016 / 50 < one.gap.p_better
    assert (many.decision.level, many.checkpoints) == (0.0016, 50)
    noisy = results(0.981, model="run-2", seed=2)
    assert judged(challenger=noisy).decision.promoted
    assert not judged(challenger=noisy, checkpoints=50).decision.promoted


def test_a_slice_that_gets_worse_holds_a_better_model_up():
    south = tuple(range(0, 100, 4))
    verdict = judged(gain=0.5, exam_of=exam(slices={"town=south": south}), worse=south)

    assert verdict.gap.mean < 0
    assert verdict.decision.held_up_by == ("slice town=south",)
    assert not verdict.decision.promoted


def test_one_slice_of_250_that_gets_clearly_worse_is_seen():
    """Holm's first bar is then 0.0002, and 4,000 resamples give nothing below 0.00025."""
    count = 250 * 20
    slices = {f"town={n}": tuple(range(20 * n, 20 * n + 20)) for n in range(250)}
    rng = np.random.default_rng(4)
    ours = results(0.5, model="run-2", count=count, seed=2, worse=slices["town=7"])
    theirs = results(1.0, model="run-1", count=count)
    verdict = judged(
        challenger=results_of(np.array(ours.nll) + rng.standard_normal(count), model="run-2", exam="exam", how=HOW),
        champion=theirs,
        exam_of=exam(count, slices=slices),
    )

    assert verdict.gap.mean < 0
    assert verdict.decision.held_up_by == ("slice town=7",)


def test_the_regression_set_and_earlier_models_are_asked_where_there_are_any():
    keep = exam(name="keep")
    lost = Answered(
        exam=keep,
        challenger=results(1.2, model="run-2", on="keep"),
        champion=results(1.0, model="run-1", on="keep"),
        earlier={"the base": results(1.1, model="base", on="keep")},
    )
    verdict = judged(gain=0.5, regression=lost)

    assert verdict.decision.held_up_by == ("regression set", "drift against the base")
    assert verdict.regression_exam == "keep"
    alone = judged(gain=0.5, earlier={"the base": results(0.2, model="base")})
    assert alone.decision.held_up_by == ("drift against the base",)


def test_of_two_seeds_the_one_that_is_less_surely_better_decides():
    verdict = judged(gain=0.1, seeds=(0.0,))

    assert not verdict.decision.promoted
    assert verdict.gap == verdict.seeds[1]
    assert not any("Another seed" in note for note in verdict.decision.notes)
    (said,) = [note for note in verdict.decision.notes if "seeds" in note]
    assert all(f"{abs(gap.mean):.4f}" in said for gap in verdict.seeds)
    assert "does not hold how far seeds differ" in said
    assert judged(gain=0.1, seeds=(0.12,)).decision.promoted


def test_of_two_seeds_neither_waits_for_fresh_records_and_the_whole_level_is_for_the_frozen_examples():
    verdict = judged(gain=0.0, seeds=(0.0,))

    assert verdict.decision.level == verdict.level == 0.02
    assert [each.run_id for each in verdict.others] == ["seed0.0"]
    assert evidence_to_gather(verdict, STANDARDS, level=verdict.level) is None


def test_only_who_was_refused_and_is_another_model_waits_for_fresh_records():
    refused = judged(gain=0.0)
    waits = evidence_to_gather(refused, STANDARDS, level=refused.level)

    assert (waits.challenger, waits.champion, waits.level, waits.nights) == ("run-2", "run-1", 0.004, ())
    assert evidence_to_gather(judged(), STANDARDS, level=0.02) is None


def test_fresh_records_promote_whom_the_frozen_examples_could_not():
    waits = FreshEvidence(challenger="run-2", champion="run-1", level=0.01)
    known = waits.model_copy(
        update={"better": (9.0,) * len(BETS), "worse": (-9.0,) * len(BETS), "records": 300, "nights": ("n",)}
    )

    assert not judged(gain=0.0, fresh=waits).decision.promoted
    by_fresh = judged(gain=0.0, fresh=known, number=2)
    assert by_fresh.decision.promoted
    assert by_fresh.decision.level == 0.0, "the frozen examples had their test"


# --- results ---------------------------------------------------------------------------------------------------------


def test_results_come_back_from_their_json_and_changed_ones_do_not():
    kept = results(1.0, model="run-1")
    content = as_json(kept)

    assert read_results(content) == kept
    content["nll"][3] += 0.001
    with pytest.raises(ValueError, match="digest"):
        read_results(content)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_any_losses_come_back_to_the_bit(losses):
    kept = results_of(np.array(losses), model="m", exam="e", how="h")

    assert read_results(as_json(kept)).nll == tuple(losses)


def test_what_was_not_judged_on_the_same_examples_in_the_same_way_is_not_compared():
    one = results(1.0, model="run-1")
    for other in (
        results(1.0, model="run-2", on="another"),
        one.model_copy(update={"how": "otherwise"}),
    ):
        with pytest.raises(ValueError, match="same examples in the same way"):
            pairs_on(exam(), other, one)


def test_a_loss_that_is_not_finite_is_no_result():
    with pytest.raises(ValidationError):
        results_of(np.array([1.0, np.nan]), model="m", exam="e", how="h")


def test_a_second_measure_is_compared_where_both_have_it():
    one, two = with_answers("a", [1.0] * 40 + [0.0] * 20), with_answers("b", [0.0] * 40 + [1.0] * 20)
    neither = results(1.0, model="run-1")

    assert answer_pairs_on(exam(), neither, neither) is None
    assert answer_pairs_on(exam(), one.without_answers(), neither) is None
    pairs = answer_pairs_on(exam(cluster=tuple(range(50)) * 2), one, two)
    assert pairs.difference.sum() == 40 - 20
    assert (len(pairs.weight), set(pairs.weight)) == (60, {1.0})
    assert sorted(pairs.cluster) == sorted([*range(50), *range(40, 50)]), "those of the examples that were asked"
    assert read_results(as_json(one)) == one


def with_answers(model, wrong, *, asked="q", places=None):
    """A model that was asked some of the examples, the last one first."""
    places = places or [*range(99, 99 - len(wrong), -1)]
    answers = given_answers(asked, places, wrong, [f"{model} {place}" for place in places])
    return results_of(np.ones(100), model=model, exam="exam", how=HOW, answers=answers)


def test_answers_to_other_questions_are_compared_with_none():
    one = with_answers("a", [1.0] * 30)
    for other in (
        with_answers("b", [1.0] * 30, asked="another metric"),
        with_answers("b", [1.0] * 30, places=[*range(30)]),
        results(1.0, model="run-1"),
    ):
        with pytest.raises(ValueError, match="did not answer the same questions"):
            answer_pairs_on(exam(), one, other)


def test_more_wrong_answers_hold_a_better_loss_up():
    """The metric is guarded beside the loss; by the answers alone nothing is promoted."""
    better = results(0.9, model="run-2", seed=2)
    answers = [with_answers(name, wrong).answers for name, wrong in (("run-2", [1.0] * 60), ("run-1", [0.0] * 60))]
    mine, theirs = (
        results_of(each.nll, model=each.model, exam=each.exam, how=each.how, answers=its)
        for each, its in zip((better, results(1.0, model="run-1")), answers, strict=True)
    )
    verdict = judged(challenger=mine, champion=theirs)
    assert verdict.decision.verdict == "better"
    assert not verdict.decision.promoted
    assert verdict.decision.held_up_by == ("answers",)
    assert "100.0 % more wrong answers on 60 examples" in verdict.decision.reasons[0]
    assert (verdict.answers.mean, verdict.answers.examples) == (1.0, 60)
    assert judged(challenger=better, champion=results(1.0, model="run-1")).decision.promoted


def test_no_share_of_answers_differs_by_more_than_all_of_them():
    """A few that differ of many stretch the bootstrap's interval beyond what shares can be."""
    verdict = judged(
        challenger=with_answers("run-2", [1.0] * 3 + [0.0] * 37), champion=with_answers("run-1", [0.0] * 40)
    )
    assert verdict.answers.low < verdict.answers.mean < verdict.answers.high == 1.0


def test_too_few_answers_to_guard_are_said():
    few = [with_answers(name, wrong) for name, wrong in (("run-2", [1.0] * 19), ("run-1", [0.0] * 19))]
    verdict = judged(challenger=few[0], champion=few[1])
    assert verdict.decision.held_up_by == ()
    assert any("Not guarded" in note and "answers" in note for note in verdict.decision.notes)


def test_long_answers_are_kept_cut_and_what_is_no_character_is_replaced():
    answers = given_answers("q", [0, 1], [0, 1], ["x" * 5000, "half \ud800"])
    assert [len(text) for text in answers.texts] == [2000, 6]
    assert answers.texts[1] == "half ?"
    many = given_answers("q", range(600), [0.0] * 600, ["x"] * 600)
    assert (len(many.texts), len(many.wrong)) == (500, 600)


def test_every_token_counts_the_same():
    asked = Exam(name="e", tokens=(1, 9))
    kept = results_of(np.array([5.0, 5.0]), model="m", exam="e", how="h")

    assert loss_of(asked, kept) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": []},
        {"tokens": [0, 1]},
        {"cluster": [1]},
        {"slices": {"a": [2]}},
        {"where": ["v.jsonl:1"]},
        {"version": 2},
        {"more": 1},
    ],
)
def test_an_exam_that_does_not_fit_together_is_none(wrong):
    content = {"version": 1, "name": "e", "tokens": [1, 2], "cluster": [0, 0], "slices": {"a": [0]}}

    assert read_exam(content).slice_masks()["a"].tolist() == [True, False]
    with pytest.raises(ValueError, match=next(iter(wrong))):
        read_exam(content | wrong)


def test_a_name_follows_the_content():
    assert name_of({"a": 1, "b": 2}) == name_of({"b": 2, "a": 1}) != name_of({"a": 1, "b": 3})
    assert isinstance(results(1.0, model="m"), ExampleResults)
