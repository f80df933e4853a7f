"""Which checkpoint is kept: noise does not decide, a real improvement does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.judging.verdict import Evaluation, _share_worse, is_exhausted, judge

EXAMPLES = 120


def evaluation(step, losses, tokens=10):
    """From the mean token loss of each example."""
    losses = np.asarray(losses, dtype=np.float64)
    each = np.full(len(losses), tokens, dtype=np.int64)
    return Evaluation(step=step, nll=losses * each, tokens=each, correct=int(each.sum()) // 2)


def history(*levels, noise=0.01, spread=1.0, seed=1):
    """Evaluations at steps 0, 50, 100, ... with these mean losses; some examples are harder than others."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(0, spread, EXAMPLES)
    made = {}
    for at, level in enumerate(levels):
        own = rng.normal(0, noise, EXAMPLES) if noise else np.zeros(EXAMPLES)
        losses = 5 + hardness - hardness.mean() + own - own.mean()
        made[50 * at] = evaluation(50 * at, losses - 5 + level)
    return made


def test_every_token_counts_the_same():
    """The mean of the examples' means would let a short example weigh as much as a long one."""
    uneven = Evaluation(step=0, nll=np.array([10.0, 90.0]), tokens=np.array([10, 30]), correct=30)

    assert uneven.loss == 2.5
    assert uneven.perplexity == pytest.approx(np.exp(2.5))
    assert uneven.token_accuracy == 0.75


def test_a_hopeless_loss_still_has_a_finite_perplexity():
    assert np.isfinite(evaluation(0, [1e6]).perplexity)


def test_a_real_improvement_moves_the_sweet_spot():
    verdict = judge(history(3.0, 2.0, 1.0))

    assert (verdict.best_step, verdict.sweet_spot_step, verdict.candidate_steps) == (100, 100, (100,))
    assert verdict.overfitting_from_step is None


def test_a_small_improvement_that_every_example_shares_is_real():
    """The examples differ by far more than the checkpoints do: pairing tells them apart."""
    verdict = judge(history(3.0, 2.0, 1.98, noise=0.02, spread=2.0))

    assert verdict.sweet_spot_step == 100


def test_the_same_numbers_without_the_pairing_would_be_noise():
    """The losses of one evaluation, dealt to other examples: same means, no pairs, no verdict."""
    paired = history(2.0, 1.98, noise=0.02, spread=2.0)
    dealt = np.random.default_rng(2).permutation(EXAMPLES)
    unpaired = {0: paired[0], 50: Evaluation(step=50, nll=paired[50].nll[dealt], tokens=paired[50].tokens, correct=1)}

    assert judge(paired).sweet_spot_step == 50
    assert judge(unpaired).best_step == 50
    assert judge(unpaired).sweet_spot_step == 0


def test_noise_does_not_move_the_sweet_spot():
    """The last one is lower by a hair: the earlier checkpoint is kept, which has been trained less."""
    verdict = judge(history(3.0, 1.0, 0.999, noise=0.2))

    assert verdict.best_step == 100
    assert verdict.sweet_spot_step == 50
    assert verdict.candidate_steps == (50, 100)


def test_one_lucky_example_does_not_move_the_sweet_spot():
    before = np.full(EXAMPLES, 2.0)
    after = before + 0.001
    after[0] = 0.5

    verdict = judge({50: evaluation(50, before), 100: evaluation(100, after)})

    assert verdict.best_step == 100
    assert verdict.sweet_spot_step == 50


def test_noise_alone_rarely_names_a_later_checkpoint():
    """One-sided at 95 %: of many runs whose checkpoints are equally good, few pass over the first."""
    rng = np.random.default_rng(5)
    runs = [
        {50: evaluation(50, rng.normal(2, 0.1, EXAMPLES)), 100: evaluation(100, rng.normal(2, 0.1, EXAMPLES))}
        for _ in range(40)
    ]

    assert sum(judge(run).sweet_spot_step != 50 for run in runs) <= 6


def test_overfitting_is_named_by_its_first_step():
    verdict = judge(history(3.0, 1.0, 1.0005, 1.4, 1.9))

    assert verdict.best_step == 50
    assert verdict.overfitting_from_step == 150


def test_a_curve_that_flattens_is_no_overfitting():
    assert judge(history(3.0, 1.0, 1.001, 1.001, noise=0.2)).overfitting_from_step is None


def test_a_base_that_training_only_made_worse_is_kept():
    verdict = judge(history(1.0, 1.5, 2.0))

    assert (verdict.best_step, verdict.sweet_spot_step, verdict.overfitting_from_step) == (0, 0, 50)


def test_of_two_equal_ones_the_earlier_is_best():
    assert judge({50: evaluation(50, [1.0, 2.0]), 100: evaluation(100, [1.0, 2.0])}).best_step == 50


def test_one_evaluation_is_its_own_verdict():
    verdict = judge({0: evaluation(0, [2.0])})

    assert (verdict.best_step, verdict.sweet_spot_step, verdict.candidate_steps) == (0, 0, (0,))


def test_no_evaluation_gives_no_verdict():
    with pytest.raises(ValueError, match="no evaluation"):
        judge({})


def test_the_verdict_is_the_same_each_time_and_whatever_the_order_of_the_mapping():
    found = history(3.0, 1.0, 0.999, 1.001, noise=0.2)

    assert judge(found) == judge(found) == judge(dict(reversed(found.items())))


def test_the_resamples_are_the_same_each_time():
    """Else a checkpoint close to the border would be kept by one attempt and deleted by the next."""
    differences = np.random.default_rng(1).normal(0.1, 1, (EXAMPLES, 5))

    assert _share_worse(differences, 0).tolist() == _share_worse(differences, 0).tolist()
    assert _share_worse(differences, 0).tolist() != _share_worse(differences, 1).tolist()


@settings(deadline=None, derandomize=True, database=None, max_examples=15)
@given(st.lists(st.lists(st.floats(0, 20), min_size=6, max_size=6), min_size=1, max_size=5))
def test_best_and_sweet_spot_are_among_the_candidates_and_the_sweet_spot_is_the_earliest(losses):
    found = {50 * at: evaluation(50 * at, row) for at, row in enumerate(losses)}
    verdict = judge(found)

    assert {verdict.best_step, verdict.sweet_spot_step} <= set(verdict.candidate_steps)
    assert verdict.sweet_spot_step == min(verdict.candidate_steps) <= verdict.best_step
    assert found[verdict.best_step].loss == min(e.loss for e in found.values())


@pytest.mark.parametrize(
    ("levels", "patience", "exhausted"),
    [
        ((3.0, 2.0, 1.0), 1, False),
        ((3.0, 1.0, 2.0), 1, True),
        ((3.0, 1.0, 2.0), 2, False),
        ((3.0, 1.0, 2.0, 1.5), 2, True),
        ((3.0, 1.0, 2.0, 0.5), 2, False),
        ((3.0, 1.0, 1.0), 1, True),
        ((3.0,), 1, False),
        ((3.0, 4.0, 5.0, 6.0), None, False),
        ((), 1, False),
    ],
)
def test_patience_ends_after_so_many_evaluations_without_a_lower_loss(levels, patience, exhausted):
    found = {50 * at: evaluation(50 * at, [level] * 4) for at, level in enumerate(levels)}

    assert is_exhausted(found, patience=patience) is exhausted


def test_a_step_that_was_dropped_is_not_chosen_when_a_later_best_makes_it_look_near_again():
    """Worse than step 10 in every example, but within the wide spread of step 20: its checkpoint is gone by then."""
    hundred = np.full(6, 100, dtype=np.int64)

    def at(step, difference):
        return Evaluation(step=step, nll=np.full(6, 100.0) + difference, tokens=hundred, correct=0)

    first, second = at(0, 0.0), at(10, -0.5)
    third = at(20, np.array([-60.0, 5, 5, 5, 5, 5]))
    assert judge({0: first, 10: second}).candidate_steps == (10,)

    everything = {0: first, 10: second, 20: third}
    assert judge(everything).sweet_spot_step == 0
    assert judge(everything, kept={10, 20}).sweet_spot_step == 10
    with pytest.raises(ValueError, match="kept"):
        judge(everything, kept=set())
