"""The gate: each reason to promote, each reason to refuse, and the sentence that says so."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.judging.paired import MOST_RESAMPLES, ROUNDING, Gap, gap_of, pairs_of
from job.core.nightly.fresh_evidence import BETS, FreshEvidence
from job.core.nightly.gate import GUARD_LEVEL, Decision, Evidence, decide, holm, shares_of, verdict_of

quick = settings(deadline=None, derandomize=True, database=None, max_examples=60)
LEVEL = 0.001


def heavy(rng, shape):
    """Student's t with four degrees of freedom."""
    return rng.standard_t(4, shape) / np.sqrt(2)


def gap(mean=-0.05, *, error=0.0134, p_better=None, p_worse=0.9, examples=500, clusters=None, **values):
    """A comparison as the bootstrap would find it."""
    p_better = (0.0001 if mean < -3 * error else 0.3) if p_better is None else p_better
    ends = {"low": mean - 1.96 * error, "high": mean + 1.96 * error}
    found = {"p_better": p_better, "p_worse": p_worse, "standard_error": error, "margin": ROUNDING, **ends}
    return Gap(mean=mean, examples=examples, clusters=clusters or examples, **found | values)


WORSE = gap(0.05, p_worse=0.0001)
EQUAL = gap(0.001, p_worse=0.4)
FEW = Gap(mean=0.5, margin=ROUNDING, examples=9, clusters=9)
SAME = Gap(mean=0.0, margin=ROUNDING, examples=500, clusters=500, identical=True, standard_error=0.0)


def evidence(**values):
    return Evidence(**{"challenger": "run-2", "champion": "run-1", "level": LEVEL, "gap": gap()} | values)


def fresh(e_better=1.0, e_worse=1.0, **values):
    """Evidence of this size on either side."""
    logs = {"better": (float(np.log(e_better)),) * len(BETS), "worse": (float(np.log(e_worse)),) * len(BETS)}
    known = {"challenger": "run-2", "champion": "run-1", "level": LEVEL, "records": 1200}
    return FreshEvidence(**known | {"nights": ("a", "b"), **logs} | values)


# --- the three verdicts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (gap(), "better"),
        (gap(p_better=LEVEL), "better"),
        (gap(p_better=LEVEL * 1.01), "cannot tell"),
        (gap(-0.01), "cannot tell"),
        (gap(0.01), "cannot tell"),
        (gap(0.05), "not better"),
        (gap(-0.01, error=0.001, p_better=0.99, margin=0.02), "not better"),
        (SAME, "not better"),
        (FEW, "cannot tell"),
    ],
)
def test_verdicts(found, verdict):
    assert verdict_of(found, LEVEL) == verdict


def test_better_is_promoted_and_the_first_sentence_says_why():
    found = decide(evidence())

    assert (found.promoted, found.verdict, found.held_up_by) == (True, "better", ())
    assert found.reasons == (
        (
            "Promoted: run-2 is 0.0500 nat a token better than run-1 on 500 examples "
            "(95 % interval 0.0237 to 0.0763 better); p = 0.0001, tonight's level is 0.001."
        ),
    )


def test_cannot_tell_says_what_so_many_examples_see_and_how_many_more_would_do():
    found = decide(evidence(gap=gap(-0.012)))

    assert (found.promoted, found.verdict) == (False, "cannot tell")
    assert found.reasons == (
        (
            "Not promoted, cannot tell: run-2 is 0.0120 nat a token better than run-1 on 500 examples "
            "(95 % interval 0.0383 better to 0.0143 worse)."
        ),
        (
            "500 examples see a gain of 0.0528 nat a token or more at tonight's level; "
            "about 9,302 more would show the measured gain."
        ),
    )


def test_a_gain_that_was_not_measured_is_not_promised_by_more_examples():
    found = decide(evidence(gap=gap(0.012)))

    assert found.reasons[1].endswith("none was measured that more of them would show.")


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (gap(-0.0634, p_better=0.002), "the measured gain is that large, but rests on too few of them to be sure."),
        (
            gap(-0.02, margin=0.03, p_better=0.9),
            "the measured gain is no more than the 0.0300 that are asked for, however many there were.",
        ),
        (gap(-ROUNDING - 1e-9, p_better=0.4), "the measured gain is too small for any number of them to show."),
    ],
)
def test_a_gain_that_was_measured_is_not_said_to_be_none(found, says):
    reasons = decide(evidence(gap=found)).reasons

    assert "better than run-1" in reasons[0]
    assert reasons[1].endswith(f" at tonight's level; {says}")


def test_not_better_says_how_much_worse():
    found = decide(evidence(gap=gap(0.05)))

    assert found.reasons == (
        (
            "Not promoted, not better: run-2 is 0.0500 nat a token worse than run-1 on 500 examples "
            "(95 % interval 0.0237 to 0.0763 worse)."
        ),
    )


def test_of_several_checkpoints_each_has_its_part_of_the_level_and_the_sentences_say_so():
    sure, less = gap(p_better=0.0001), gap(p_better=0.00011)
    found, other = (decide(evidence(gap=each, checkpoints=10)) for each in (sure, less))

    assert found.promoted
    assert not other.promoted
    assert found.reasons[0].endswith("p = 0.0001, tonight's level is 0.001, 0.0001 for each of 10 checkpoints.")
    assert any(
        note.startswith("Its checkpoint is the one of 10 that the frozen examples chose") for note in found.notes
    )
    assert not any("checkpoint" in note for note in decide(evidence()).notes)
    seen = f"{sure.smallest_seen(LEVEL / 10):.4f}"
    assert f"see a gain of {seen} nat" in decide(evidence(gap=gap(-0.012), checkpoints=10)).reasons[1]


def best_of(rng, checkpoints, examples=120):
    """A training whose checkpoints are all as good as the champion that it started from, and that one is the best."""
    steps = 0.1 * heavy(rng, (checkpoints, examples))
    off = np.cumsum(steps, axis=0)  # each goes on from the one before
    losses = 2.0 + rng.exponential(1.0, examples)
    best = off[np.argmin(off.mean(axis=1))]
    return gap_of(pairs_of(losses + best, losses, np.ones(examples)), resamples=999)


def test_the_best_of_many_checkpoints_that_are_no_better_is_promoted_no_more_often_than_the_level_says():
    """All start from the champion, which has no choice tonight: 400 trainings of 8 checkpoints, at 5 %."""
    rng, level, checkpoints = np.random.default_rng(21), 0.05, 8
    gaps = [best_of(rng, checkpoints) for _ in range(400)]

    def promoted(among):
        return sum(decide(evidence(gap=each, level=level, checkpoints=among)).promoted for each in gaps)

    most = 400 * level + 3 * np.sqrt(400 * level * (1 - level))
    assert promoted(1) > 1.5 * most, "the choice is worth something here"
    assert promoted(checkpoints) <= most


def test_identical_models_are_never_promoted_whatever_else_is_said():
    found = decide(evidence(gap=SAME, fresh=fresh(e_better=1e9)))

    assert (found.promoted, found.verdict) == (False, "not better")
    assert found.reasons == ("Not promoted, not better: run-2 gives the same as run-1 on 500 examples.",)


def test_too_few_examples_are_said_to_be():
    found = decide(evidence(gap=FEW))

    assert found.reasons[1] == "9 examples are too few for a test: 20 independent ones are needed."


def test_clusters_are_named_where_examples_belong_together():
    assert "on 500 examples in 100 clusters" in decide(evidence(gap=gap(clusters=100))).reasons[0]


def test_what_a_challenger_has_to_be_better_by_is_said():
    assert "and has to be better by 0.0100" in decide(evidence(gap=gap(-0.02, margin=0.01))).reasons[0]


def test_a_budget_that_is_nearly_spent_is_said_to_be():
    """No resampling reaches so low a level: it would be refused for ever without a word."""
    level = 0.5 / MOST_RESAMPLES
    for little in (evidence(level=level), evidence(level=4 * level, checkpoints=4)):
        found = decide(little)
        assert not found.promoted
        assert found.reasons[1].startswith("The error budget has too little left for a test tonight")


# --- guards ----------------------------------------------------------------------------------------------------------


def test_a_slice_that_gets_worse_while_the_mean_improves_holds_it_up():
    found = decide(evidence(slices={"de": WORSE, "en": gap(), "fr": EQUAL}))

    assert (found.promoted, found.verdict, found.held_up_by) == (False, "better", ("slice de",))
    assert found.reasons[0].startswith("Not promoted: run-2 is 0.0500 nat a token better than run-1")
    assert found.reasons[0].endswith(
        "; but slice de: got significantly worse, by 0.0500 nat a token on 500 examples (p = 0.0001)."
    )


def test_of_many_slices_one_that_is_a_little_worse_is_chance():
    """3 % in one of ten: one of them is below that in a quarter of all nights."""
    slices = {str(n): EQUAL for n in range(9)}

    assert decide(evidence(slices=slices | {"odd": gap(0.02, p_worse=0.03)})).promoted
    assert decide(evidence(slices=slices | {"odd": gap(0.02, p_worse=0.004)})).held_up_by == ("slice odd",)


def test_a_slice_that_is_too_small_guards_nothing_and_the_notes_say_so():
    found = decide(evidence(slices={"rare": FEW, "de": gap(0.03, p_worse=0.04)}))

    assert found.held_up_by == ("slice de",)  # alone, and so at the whole level
    assert "Not guarded, because fewer than 20 independent examples: rare." in found.notes


def test_a_regression_set_that_is_too_small_for_a_test_still_holds_by_what_is_measured():
    found = decide(evidence(regression=FEW))

    assert found.held_up_by == ("regression set",)
    assert any("holds a run up by what is measured alone" in note for note in found.notes)
    assert not any("measured alone" in note for note in decide(evidence(regression=EQUAL)).notes)


def test_more_wrong_answers_hold_it_up_though_the_loss_is_lower():
    found = decide(evidence(answers=gap(0.06, p_worse=0.001)))

    assert found.held_up_by == ("answers",)
    assert "got significantly worse, by 6.0 % more wrong answers" in found.reasons[0]


@pytest.mark.parametrize(
    ("down", "holds"),
    [
        (gap(0.015, p_worse=0.05), False),
        (gap(0.021, p_worse=0.2), False),
        (gap(0.019, p_worse=0.2), True),
        (gap(0.001, p_worse=0.5), True),
        (gap(-0.05), True),
        (SAME, True),
    ],
)
def test_regression_set_and_drift_hold_below_the_bound_and_without_significance(down, holds):
    assert decide(evidence(regression=down)).promoted is holds
    assert decide(evidence(drift={"the base": down})).promoted is holds
    assert decide(evidence(drift={"the champion of 30 days ago": down, "the base": gap()})).promoted is holds


def test_twelve_small_steps_down_are_seen_by_the_drift_guard():
    """Each is better than the one before by the frozen examples, and none is seen on the regression set alone."""
    steps = [decide(evidence(regression=gap(0.004, p_worse=0.38), drift={"d": gap(0.004 * n)})) for n in range(1, 13)]

    assert [found.promoted for found in steps] == [True] * 5 + [False] * 7
    assert steps[-1].held_up_by == ("drift against d",)
    assert "drift: 0.0480 nat a token worse than d" in steps[-1].reasons[0]


def test_how_much_drift_is_allowed_is_the_recipe_s():
    assert decide(evidence(drift={"d": gap(0.04, p_worse=0.2)}, max_drift=0.05)).promoted


def test_all_that_speaks_against_it_is_said_also_of_one_that_is_not_better():
    found = decide(evidence(gap=gap(-0.01), slices={"de": WORSE}, regression=WORSE))

    assert found.held_up_by == ("slice de", "regression set")
    assert [reason.partition(":")[0] for reason in found.reasons[2:]] == ["Slice de", "The regression set"]


# --- fresh records ---------------------------------------------------------------------------------------------------


def test_one_that_waits_is_promoted_by_fresh_records():
    found = decide(evidence(gap=gap(-0.02), level=0.0, fresh=fresh(e_better=1.0001 / LEVEL)))

    assert (found.promoted, found.verdict) == (True, "better")
    assert found.reasons == (
        (
            "Promoted: run-2 is better than run-1 on 1,200 records of 2 nights that neither had seen "
            "(evidence 1,000, 1,000 is enough)."
        ),
    )


def test_one_that_waits_goes_on_waiting_below_its_level():
    found = decide(evidence(gap=gap(-0.02), level=0.0, fresh=fresh(e_better=0.99 / LEVEL)))

    assert (found.promoted, found.verdict) == (False, "cannot tell")
    assert found.reasons[1] == "1,200 fresh records so far: evidence 990, 1,000 is enough."


def test_fresh_records_do_not_overrule_frozen_examples_that_say_worse():
    found = decide(evidence(gap=gap(0.05, p_worse=0.001), level=0.0, fresh=fresh(e_better=1e6)))

    assert found.held_up_by == ("frozen examples",)


def test_fresh_records_that_say_worse_hold_it_up():
    found = decide(evidence(fresh=fresh(e_worse=1.0001 / GUARD_LEVEL)))

    assert found.held_up_by == ("fresh records",)
    assert "on 1,200 fresh records it is worse than run-1 (evidence 20, 20 is enough)" in found.reasons[0]


def test_fresh_records_of_other_models_are_refused():
    with pytest.raises(ValueError, match="run-2 against run-0 are none of this comparison"):
        decide(evidence(fresh=fresh(champion="run-0")))


def test_a_level_is_shared_and_none_of_it_is_given_twice():
    assert sum(shares_of(0.01)) == 0.01


def test_one_seed_is_said_to_be_one():
    assert any("seed" in note for note in decide(evidence()).notes)


def test_of_two_seeds_both_figures_are_said_and_that_the_interval_holds_no_other_seed():
    found = decide(evidence(gap=gap(-0.012), seeds=(gap(-0.034), gap(-0.012))))

    assert (
        "Two seeds were trained: 0.0340 better and 0.0120 better, in nats a token. The interval is that of the one "
        "that is less surely better, which decided; it does not hold how far seeds differ."
    ) in found.notes
    assert "0.0340 better and 0.0050 worse" in decide(evidence(seeds=(gap(-0.034), gap(0.005)))).notes[0]


@quick
@given(st.integers(0, 2**32), st.integers(1, 200), st.floats(0, 1))
def test_a_model_beside_itself_is_not_better_at_any_level(seed, examples, level):
    rng = np.random.default_rng(seed)
    losses, tokens = rng.lognormal(3, 2, examples), rng.integers(1, 100, examples)
    found = decide(evidence(gap=gap_of(pairs_of(losses, losses.copy(), tokens)), level=level))

    assert (found.promoted, found.verdict) == (False, "not better")


# --- Holm ------------------------------------------------------------------------------------------------------------


def test_holm_s_own_example():
    """0.01 <= 0.05 / 4, 0.015 <= 0.05 / 3, 0.03 > 0.05 / 2: the rest stand, whatever comes after."""
    assert holm({"a": 0.015, "b": 0.03, "c": 0.01, "d": 0.04}) == ("c", "a")
    assert holm({}) == ()
    assert holm({"a": 0.05}) == ("a",)


@quick
@given(st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0, 1), max_size=12))
def test_holm_finds_what_bonferroni_finds_and_nothing_above_the_level(p_values):
    found = set(holm(p_values))

    assert {name for name, p in p_values.items() if p <= GUARD_LEVEL / len(p_values)} <= found
    assert all(p_values[name] <= GUARD_LEVEL for name in found)
    assert all(p_values[name] <= p_values[other] for name in found for other in set(p_values) - found)


# --- properties of the decision --------------------------------------------------------------------------------------

gaps = st.one_of(
    st.just(SAME),
    st.just(FEW),
    st.builds(
        gap,
        st.floats(-0.2, 0.2),
        error=st.floats(0.001, 0.1),
        p_better=st.floats(1e-5, 1),
        p_worse=st.floats(1e-5, 1),
        examples=st.integers(20, 10**6),
    ),
)
anything = st.builds(
    evidence,
    level=st.floats(0, 0.05),
    gap=gaps,
    slices=st.dictionaries(st.sampled_from(["de", "en", "fr"]), gaps),
    answers=st.none() | gaps,
    regression=st.none() | gaps,
    drift=st.dictionaries(st.sampled_from(["the base", "the champion of 30 days ago"]), gaps),
    fresh=st.none() | st.builds(fresh, st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), level=st.floats(0, 0.05)),
    seeds=st.just(()) | st.tuples(gaps, gaps),
    checkpoints=st.integers(1, 30),
)


@quick
@given(anything)
def test_what_is_promoted_is_better_and_nothing_holds_it_up_and_whole_sentences_say_so(found):
    decision = decide(found)

    assert decision.promoted == (decision.verdict == "better" and not decision.held_up_by)
    assert decision.reasons[0].startswith("Promoted: " if decision.promoted else "Not promoted")
    assert all(said[0].isupper() or said[0].isdigit() for said in (*decision.reasons, *decision.notes))
    assert all(said.endswith(".") and "\n" not in said for said in (*decision.reasons, *decision.notes))
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


@quick
@given(anything, gaps)
def test_a_further_guard_never_promotes(found, another):
    further = Evidence(**{name: getattr(found, name) for name in Evidence.__slots__} | {"regression": another})
    without = Evidence(**{name: getattr(found, name) for name in Evidence.__slots__} | {"regression": None})

    assert decide(without).promoted or not decide(further).promoted
