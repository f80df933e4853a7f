"""What to do after a run: each rule speaks where it applies, with its figures, and is silent elsewhere."""

import pytest
from page_reports import gsm8k, small, with_sources
from report_fixtures import DATA, LEARNED, PLAN, THROUGHPUT, evaluation

from job.core.data.lengths import Candidate
from job.core.judging.held_out import ExactMatch
from job.core.judging.judged_answers import Gain, MetricReport
from job.core.reports.next_steps import next_steps


def steps_of(report, word):
    return [step for step in next_steps(report) if word in step]


def judged(losses, *, steps=None, overfitting=None, chosen=None, recipe=None, stopped_early=False):
    """A run by its validation losses at steps."""
    best = min(losses, key=losses.get)
    chosen = best if chosen is None else chosen
    spot = LEARNED["sweet_spot"].model_copy(
        update={
            "step": chosen,
            "loss": losses[chosen],
            "best_step": best,
            "best_loss": losses[best],
            "base_loss": losses[0],
            "overfitting_from_step": overfitting,
            "stopped_early": stopped_early,
        }
    )
    return small(
        evaluations=tuple(evaluation(step, loss) for step, loss in losses.items()),
        sweet_spot=spot,
        plan=PLAN.model_copy(update={"steps": steps or max(losses)}),
        recipe=recipe or {"train": {"steps": steps or max(losses), "learning_rate": 2e-4}},
        held_out=None,
        exact_match=None,
    )


def data(**changes):
    return small(data=DATA.model_copy(update={"bad_lines": 0, "first_bad_lines": ()} | changes))


def train(**changes):
    return DATA.train.model_copy(update=changes)


# --- how long ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_still_falls_asks_for_as_many_steps_as_its_falls_foretell():
    """1.0, 0.5, 0.25: the falls halve, so the seventh from there on is less than a hundredth of the loss."""
    (step,) = steps_of(judged({0: 2.0, 1000: 1.0, 1100: 0.5, 1200: 0.25}), "still falling")

    assert step == (
        "still falling at the end, by 0.25 over the last 100 steps: about 700 more steps, so train.steps: 1900"
    )


def test_a_loss_that_falls_steadily_asks_for_no_more_than_as_many_steps_again():
    (step,) = steps_of(judged({0: 2.0, 100: 1.75, 200: 1.5, 300: 1.25}), "still falling")

    assert step.endswith("about 300 more steps, so train.steps: 600")


def test_a_run_in_epochs_is_told_epochs():
    recipe = {"train": {"epochs": 3.0, "steps": None}}
    (step,) = steps_of(judged({0: 2.0, 100: 1.0, 200: 0.9, 300: 0.88}, recipe=recipe), "still falling")

    assert step.endswith("about 100 more steps, so train.epochs: 4")


@pytest.mark.parametrize(
    "report",
    [
        judged({0: 2.0, 100: 1.0, 200: 0.999}),  # a thousandth
        judged({0: 2.0, 100: 0.5, 200: 0.6}),  # it rose
        judged({0: 2.0, 100: 1.0}),  # nothing to compare with
        judged({0: 2.0, 100: 1.0, 200: 0.5}, chosen=100),  # not significantly better than the one before
        judged({0: 2.0, 100: 1.0, 200: 0.5}, steps=400, stopped_early=True),
    ],
)
def test_a_loss_that_does_not_fall_at_the_end_asks_for_no_more_steps(report):
    assert steps_of(report, "still falling") == []


@pytest.mark.parametrize(
    ("best", "told"),
    [(150, "best at 30% of the run (step 150 of 500)"), (100, "best at 20% of the run (step 100 of 500)")],
)
def test_a_best_step_long_before_the_end_asks_for_a_shorter_run(best, told):
    report = judged({0: 2.0, best: 1.0, 500: 1.5}, overfitting=500, recipe={"train": {"epochs": 4}})
    (step,) = steps_of(report, "best at")

    assert step.startswith(told)
    assert f"train.epochs: {2 if best == 150 else 1}, or more data" in step


@pytest.mark.parametrize(
    "report",
    [
        judged({0: 2.0, 150: 1.0, 500: 1.001}),  # not significantly worse
        judged({0: 2.0, 400: 1.0, 500: 1.5}, overfitting=500),
        judged({0: 1.0, 500: 1.5}, overfitting=500),  # the base is best: another rule's
    ],
)
def test_a_best_step_near_the_end_asks_for_nothing(report):
    assert steps_of(report, "best at") == []


def test_a_loss_that_rose_from_the_start_asks_for_a_lower_rate():
    (step,) = steps_of(judged({0: 1.0, 50: 1.2, 100: 1.5}, overfitting=50), "risen")

    assert "try train.learning_rate 2e-05 (it was 0.0002)" in step


def test_of_a_base_that_was_kept_the_examples_far_from_the_others_are_named_too():
    report = gsm8k(rises=0.02)

    assert "look at each example's change" in steps_of(report, "learning_rate")[0]
    assert report.tried.outliers[0].where in steps_of(report, "wrong labels")[0]


def test_a_run_that_learned_nothing_is_told_so():
    (step,) = steps_of(judged({0: 1.0, 50: 0.999, 100: 1.0}, chosen=0), "nothing was learned")

    assert "look at the training examples (`preview`)" in step


# --- the data ---------------------------------------------------------------------------------------------------------

LENGTHS = (
    Candidate(tokens=512, examples_over=120, share_cut=0.08),
    Candidate(tokens=1024, examples_over=2, share_cut=0.0064),
)
COUNTED = tuple(
    each.model_copy(update={"targets_cut": cut, "work": work})
    for each, cut, work in zip(LENGTHS, (0.12, 0.004), (1.0, 1.085), strict=True)
)
DEAR = (COUNTED[0], COUNTED[1].model_copy(update={"work": 1.6}))


def test_targets_that_are_cut_ask_for_the_max_length_that_cuts_few_with_the_time_that_it_takes():
    report = data(max_length=512, train=train(rows=1000, truncated=120, dropped=0), candidates=COUNTED)

    (step,) = steps_of(report, "max_length")
    assert step == "12.0% of the targets were cut at 512: 1,024 cuts 0.4% and costs 8% more time (data.max_length)"


def test_where_the_work_is_not_known_tokens_are_named():
    unknown = tuple(each.model_copy(update={"work": None}) for each in COUNTED)
    report = data(max_length=512, train=train(rows=1000, truncated=120, dropped=0), candidates=unknown)

    assert "and costs 8% more tokens" in steps_of(report, "max_length")[0]


def test_long_prompts_that_are_cut_behind_their_answers_lose_nothing():
    """Many examples are longer, and hardly a target lies beyond max_length."""
    few = (COUNTED[0].model_copy(update={"targets_cut": 0.01}), COUNTED[1])

    report = data(max_length=512, train=train(rows=1000, truncated=120, dropped=0), candidates=few)

    assert steps_of(report, "max_length") == []


@pytest.mark.parametrize(
    ("changes", "candidates"),
    [({"truncated": 120, "dropped": 0}, LENGTHS), ({"truncated": 0, "dropped": 120}, COUNTED)],
)
def test_examples_are_counted_where_they_are_dropped_or_an_earlier_version_counted_no_targets(changes, candidates):
    unknown = tuple(each.model_copy(update={"work": None}) for each in candidates)
    report = data(max_length=512, train=train(rows=1000, **changes), candidates=unknown)

    (step,) = steps_of(report, "max_length")
    assert step == (
        "12.0% of the training examples are longer than max_length 512: 1,024 leaves 0.2% and costs 8% more tokens "
        "(data.max_length)"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"train": train(rows=1000, truncated=5, dropped=0), "candidates": LENGTHS},  # few
        {"train": train(rows=1000, truncated=120), "candidates": LENGTHS[:1]},  # the base has no more positions
        {"train": train(rows=1000, truncated=120), "candidates": ()},  # an earlier version's report
        {
            "train": train(rows=1000, truncated=120),
            "candidates": (LENGTHS[0].model_copy(update={"share_cut": 0.7}), LENGTHS[1]),
        },  # three times as dear
        {
            "train": train(rows=1000, truncated=120, dropped=0),
            "candidates": DEAR,
        },
    ],
)
def test_few_cuts_or_none_that_can_be_helped_ask_for_nothing(changes):
    assert steps_of(data(max_length=512, **changes), "max_length") == []


def test_held_out_examples_that_are_trained_on_come_first():
    assert next_steps(data(overlap=7))[0].startswith("7 of the 120 held-out examples are also trained on")
    assert steps_of(data(overlap=0), "flatters") == []


def test_repeated_examples_are_told_from_a_twentieth_on():
    assert "60 of 1,000 training examples (6%)" in steps_of(data(train=train(rows=1000, duplicates=60)), "repeat")[0]
    assert steps_of(data(train=train(rows=1000, duplicates=50)), "repeat") == []


def test_few_held_out_examples_are_told():
    few = DATA.validation.model_copy(update={"used": 49})

    assert steps_of(data(validation=few), "49 held-out examples are few")
    assert steps_of(data(validation=few.model_copy(update={"used": 50})), "are few") == []


def test_wrong_lines_are_told_with_the_first_one():
    assert steps_of(small(), "wrong lines") == [
        'wrong lines were left out (1): mend them, the first is train.jsonl:17 ("text" is missing)'
    ]
    assert steps_of(data(), "wrong lines") == []


# --- what was learned -------------------------------------------------------------------------------------------------


def test_a_source_that_became_worse_is_named_with_both_losses():
    assert steps_of(with_sources(), "older notes") == [
        "the loss has risen on older notes (1 -> 1.4): give what is to be kept a larger weight in data.train"
    ]


def test_a_source_of_which_nothing_was_learned_is_named():
    report = with_sources()
    same = report.evaluations[1].sources
    same = (same[0], same[1].model_copy(update={"loss": 1.005}))
    evaluations = tuple(e.model_copy(update={"sources": same}) if e.step == 50 else e for e in report.evaluations)

    assert steps_of(report.model_copy(update={"evaluations": evaluations}), "older notes") == [
        "nothing was learned of older notes: look at its examples, or leave it out"
    ]


def test_a_base_that_was_right_already_is_told():
    match = ExactMatch(examples=60, base=0.5, tuned=0.9)

    assert "already right on 50% of 60 answers" in steps_of(small(exact_match=match), "already right")[0]
    assert steps_of(small(exact_match=match.model_copy(update={"base": 0.49})), "already right") == []
    assert steps_of(small(exact_match=None), "already right") == []


def right(before, *, name="pattern", exact=0.0):
    """By the recipe's metric, and word for word."""
    scores = Gain(examples=400, before=before, after=0.96, gain=0.96 - before)
    metric = MetricReport(name=name, max_new_tokens=256, scores=scores)
    return small(metric=metric, exact_match=ExactMatch(examples=60, base=exact, tuned=0.1))


def test_a_base_that_was_right_already_by_the_recipe_s_metric_is_told():
    """A whole solution is hardly ever the same word for word, though its last number is right."""
    (step,) = steps_of(right(0.95), "already right")
    assert step.startswith("the base was already right on 95% of 400 answers (pattern): examples that it cannot")
    assert steps_of(right(0.49), "already right") == []
    assert steps_of(right(0.2, exact=0.9), "already right") == []
    assert steps_of(right(0.95).model_copy(update={"exact_match": None}), "already right")


def test_half_a_score_of_words_in_common_is_no_right_answer():
    assert steps_of(right(0.95, name="rouge_l"), "already right") == []
    assert "90% of 60 answers: " in steps_of(right(0.1, name="rouge_l", exact=0.9), "already right")[0]


def test_examples_far_from_the_others_are_named_by_file_and_line():
    (step,) = steps_of(gsm8k(), "wrong labels")

    assert "2 held-out examples" in step
    assert {"test.jsonl:8", "test.jsonl:41"} <= {*step.replace(",", " ").split()}
    assert steps_of(small(), "wrong labels") == []


# --- time -------------------------------------------------------------------------------------------------------------


def test_evaluations_that_take_much_of_the_time_are_told():
    def spent(**seconds):
        return small(throughput=THROUGHPUT.model_copy(update={"phase_seconds": seconds}))

    assert "evaluations took 40% of the time" in steps_of(spent(train=60.0, evaluate=40.0), "evaluations")[0]
    assert steps_of(spent(train=75.0, evaluate=25.0), "evaluations") == []
    assert steps_of(spent(), "evaluations") == []


def test_a_stop_that_does_not_fit_is_told():
    from dataclasses import replace

    stop = replace(small().stop, needed_seconds=95.0, fits=False)

    assert "needs about 95 s and was given 30" in steps_of(small(stop=stop), "a stop")[0]
    assert steps_of(small(), "a stop") == []


# --- all of them ------------------------------------------------------------------------------------------------------


def test_a_run_in_which_nothing_is_to_be_seen_says_nothing():
    quiet = judged({0: 2.0, 100: 1.0, 200: 0.999})

    assert next_steps(quiet.model_copy(update={"data": data().data})) == []


@pytest.mark.parametrize("recipe", [{}, {"train": None}, {"train": {"epochs": "many"}}, {"train": {"epochs": -1}}])
def test_a_recipe_of_another_form_costs_no_advice(recipe):
    report = judged({0: 2.0, 100: 1.0, 200: 0.5}, recipe=recipe)

    assert "train.steps: 400" in steps_of(report, "still falling")[0]
