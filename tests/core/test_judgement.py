"""From kept results to a verdict: the same numbers give the same verdict, and no other numbers are compared."""

import json

import numpy as np
import pytest
from channel_material import HOW, STANDARDS, exam, judged, results
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from job.core.channel import Judged, read_as
from job.core.example_results import (
    Exam,
    ExampleResults,
    answer_pairs_on,
    loss_of,
    name_of,
    pairs_on,
    read_exam,
    read_results,
    results_of,
)
from job.core.fresh_evidence import FreshEvidence
from job.core.judgement import Answered, evidence_to_gather


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
    assert better.decision.level == 0.01, "half of what was paid is for fresh records"
    assert better.challenger_loss == pytest.approx(better.champion_loss - 0.1, abs=0.02)
    assert any("Another seed" in note for note in better.decision.notes)


def test_a_verdict_that_is_made_again_is_the_same():
    assert judged() == judged()
    assert judged(number=2).gap != judged().gap, "another round draws other resamples"


def test_a_slice_that_gets_worse_holds_a_better_model_up():
    south = tuple(range(0, 100, 4))
    verdict = judged(gain=0.5, exam_of=exam(slices={"town=south": south}), worse=south)

    assert verdict.gap.mean < 0
    assert verdict.decision.held_up_by == ("slice town=south",)
    assert not verdict.decision.promoted


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
    assert judged(gain=0.1, seeds=(0.12,)).decision.promoted


def test_of_two_seeds_neither_waits_for_fresh_records_and_the_whole_level_is_for_the_frozen_examples():
    verdict = judged(gain=0.0, seeds=(0.0,))

    assert verdict.decision.level == verdict.level == 0.02
    assert [each.run_id for each in verdict.others] == ["seed0.0"]
    assert evidence_to_gather(verdict, exam(), STANDARDS, level=verdict.level) is None


def test_only_who_was_refused_and_is_another_model_waits_for_fresh_records():
    refused = judged(gain=0.0)
    waits = evidence_to_gather(refused, exam(), STANDARDS, level=refused.level)

    assert (waits.challenger, waits.champion, waits.level, waits.full_tokens) == ("run-2", "run-1", 0.01, 10)
    assert evidence_to_gather(judged(), exam(), STANDARDS, level=0.02) is None


def test_fresh_records_promote_whom_the_frozen_examples_could_not():
    waits = FreshEvidence(challenger="run-2", champion="run-1", level=0.01, full_tokens=10.0)
    known = waits.model_copy(update={"better": (9.0,) * 8, "worse": (-9.0,) * 8, "records": 300, "nights": ("n",)})

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
    wrong = np.array([1.0] * 40 + [0.0] * 60)
    one = results_of(np.ones(100), model="a", exam="exam", how=HOW, wrong=wrong)
    two = results_of(np.ones(100), model="b", exam="exam", how=HOW, wrong=1 - wrong)

    assert answer_pairs_on(exam(), one, results(1.0, model="run-1")) is None
    pairs = answer_pairs_on(exam(), one, two)
    assert pairs.difference.sum() == 40 - 60
    assert read_results(as_json(one)) == one


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
