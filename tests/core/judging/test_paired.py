"""A paired comparison: its exact small cases, what must not change it, and that its p-values mean what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.judging.paired import FEWEST, GUARD_RESAMPLES, RESAMPLES, ROUNDING, Gap, gap_at, gap_of, gaps_of, pairs_of

FEW = 999
"""Resamples where the exact tail does not matter."""
quick = settings(deadline=None, derandomize=True, database=None, max_examples=25)


def heavy(rng, shape, *, sd=0.3):
    """Student's t with four degrees of freedom: finite variance, infinite kurtosis."""
    return rng.standard_t(4, shape) / np.sqrt(2) * sd


def gap(differences, tokens=10, *, cluster=None, **options):
    """Of a challenger whose losses a token differ by this."""
    differences = np.asarray(differences, dtype=np.float64)
    weight = np.broadcast_to(np.asarray(tokens, dtype=np.float64), differences.shape)
    return gap_of(pairs_of(differences * weight, np.zeros(len(weight)), weight, cluster), **options)


# --- exact cases -----------------------------------------------------------------------------------------------------


def test_every_token_counts_the_same():
    """Mean of the sums, not of the means: (2 x 1 + 8 x 0.5) / 10."""
    found = gap([1.0, 0.5], [2, 8])

    assert found.mean == 0.6
    assert (found.standard_error, found.low, found.high, found.p_better, found.p_worse) == (None, None, None, 1, 1)


def test_the_standard_error_of_equal_lengths_is_the_sample_s():
    differences = heavy(np.random.default_rng(1), 500)
    found = gap(differences, resamples=FEW)

    assert found.standard_error == pytest.approx(differences.std(ddof=1) / np.sqrt(500))


def test_a_cluster_of_copies_counts_once():
    """Each example five times over is no more than the examples themselves."""
    differences = heavy(np.random.default_rng(2), 100)
    alone = gap(differences, resamples=FEW)
    copied = gap(np.repeat(differences, 5), cluster=np.repeat(np.arange(100), 5), resamples=FEW)
    taken_for_independent = gap(np.repeat(differences, 5), resamples=FEW)

    assert (copied.examples, copied.clusters) == (500, 100)
    assert copied.standard_error == pytest.approx(alone.standard_error)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    assert taken_for_independent.standard_error < alone.standard_error / 2


def test_identical_models_are_said_to_be():
    found = gap(np.zeros(500))

    assert found.identical
    assert (found.mean, found.p_better, found.p_worse) == (0, 1, 1)
    assert not gap([*np.zeros(499), 1e-9], resamples=FEW).identical


def test_what_rounding_makes_is_no_gain():
    """All of one sign, and so as sure as can be, but no more than another size of micro-batch makes."""
    rounded = gap(np.full(500, -ROUNDING / 2), resamples=FEW)
    real = gap(np.full(500, -2 * ROUNDING), resamples=FEW)

    assert (rounded.p_better, rounded.p_worse) == (1, 1)
    assert real.p_better == 1 / (FEW + 1)


def test_a_gain_has_to_be_larger_than_what_is_asked_for():
    differences = -0.05 + heavy(np.random.default_rng(3), 500, sd=0.1)

    assert gap(differences).p_better < 0.001
    assert gap(differences, min_improvement=0.05).p_better > 0.2
    assert gap(differences, min_improvement=0.05).margin == 0.05


def test_few_that_differ_show_no_more_than_a_sign_test_would():
    """Five new wrong answers of 500: the chance of five heads, although no resample has fewer than none."""
    answers = np.zeros(500)
    answers[:5] = 1

    assert gap(answers, 1).p_worse == 1 / 32


def test_one_example_that_is_all_the_spread_leaves_a_finite_interval():
    differences = np.full(500, 0.01)
    differences[0] = -30
    found = gap(differences, resamples=FEW)

    assert np.isfinite([found.low, found.high]).all()
    assert found.p_better > 0.05


def test_too_few_examples_say_nothing():
    """However large the difference: nobody knows how far others would differ."""
    few = gap(np.linspace(-1.1, -0.9, FEWEST - 1))

    assert (few.p_better, few.low, few.smallest_seen(0.01), few.more_examples(0.01)) == (1, None, None, None)
    assert gap(np.linspace(-1.1, -0.9, FEWEST)).p_better < 0.001
    assert gap([]).mean == 0


def test_a_slice_is_compared_as_if_it_were_all():
    rng = np.random.default_rng(4)
    differences, tokens, german = heavy(rng, 300), rng.integers(1, 90, 300), rng.random(300) < 0.3
    pairs = pairs_of(differences * tokens, np.zeros(300), tokens)

    assert gaps_of(pairs, {"de": german}, 0.05) == {
        "de": gap(differences[german], tokens[german], resamples=GUARD_RESAMPLES)
    }


def test_more_slices_get_the_resamples_that_show_a_loss_at_their_level():
    differences = np.abs(heavy(np.random.default_rng(11), 200))
    pairs = pairs_of(differences, np.zeros(200), np.ones(200))
    worse, halves = np.ones(200, dtype=bool), np.arange(200) < 100

    for count in (10, 250):
        found = gaps_of(pairs, {"all": worse, "half": halves}, 0.05 / count)
        assert max(each.p_worse for each in found.values()) <= 0.05 / count / 2
    better = pairs_of(-differences, np.zeros(200), np.ones(200))
    assert gaps_of(better, {"all": worse}, 1e-6)["all"] == gap(-differences, 1, resamples=GUARD_RESAMPLES)


@pytest.mark.parametrize(
    ("challenger", "champion", "weight", "cluster"),
    [
        ([1.0], [1.0, 2.0], [1, 1], None),
        ([1.0, 2.0], [1.0, 2.0], [1], None),
        ([1.0, 2.0], [1.0, 2.0], [1, 1], [7]),
        ([1.0, np.nan], [1.0, 2.0], [1, 1], None),
        ([1.0, 2.0], [np.inf, 2.0], [1, 1], None),
        ([1.0, 2.0], [1.0, 2.0], [1, 0], None),
    ],
)
def test_what_was_not_judged_alike_is_refused(challenger, champion, weight, cluster):
    arrays = [None if part is None else np.array(part) for part in (challenger, champion, weight, cluster)]
    with pytest.raises(ValueError, match=r"differ|not finite"):
        pairs_of(*arrays)


# --- what so many examples can see -----------------------------------------------------------------------------------


def test_the_smallest_difference_that_is_seen_is_seen_in_four_nights_of_five():
    rng = np.random.default_rng(5)
    level, sure = 0.01, Gap(examples=400, clusters=400, mean=0, margin=ROUNDING, standard_error=0.3 / np.sqrt(400))
    smallest = sure.smallest_seen(level)
    seen = [gap(heavy(rng, 400) - smallest, resamples=FEW).p_better <= level for _ in range(150)]

    assert 0.7 <= np.mean(seen) <= 0.9


def test_as_many_more_examples_as_it_says_would_show_the_gain():
    found = Gap(examples=500, clusters=500, mean=-0.02, margin=ROUNDING, standard_error=0.3 / np.sqrt(500))
    more = found.more_examples(0.01)
    larger = found.model_copy(update={"examples": 500 + more, "standard_error": 0.3 / np.sqrt(500 + more)})

    assert larger.smallest_seen(0.01) == pytest.approx(0.02, rel=1e-3)
    assert larger.more_examples(0.01) <= 1
    assert found.model_copy(update={"mean": 0.02}).more_examples(0.01) is None
    assert found.model_copy(update={"mean": -ROUNDING - 1e-9}).more_examples(0.01) is None


# --- properties ------------------------------------------------------------------------------------------------------

pairs_drawn = st.integers(0, 2**32).map(np.random.default_rng)


@quick
@given(pairs_drawn, st.integers(FEWEST, 60), st.floats(-0.2, 0.2))
def test_the_interval_holds_the_mean_and_exchanging_the_models_turns_it_over(rng, examples, shift):
    differences, tokens = heavy(rng, examples) + shift, rng.integers(1, 50, examples)
    found, other = gap(differences, tokens, resamples=FEW), gap(-differences, tokens, resamples=FEW)

    assert found.low <= found.mean <= found.high
    assert (other.mean, other.standard_error) == pytest.approx((-found.mean, found.standard_error))
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low), rel=0.02, abs=1e-6)
    assert other.p_worse == pytest.approx(found.p_better, abs=2 / FEW)


@quick
@given(pairs_drawn, st.integers(3 * FEWEST, 150), st.floats(0.01, 100))
def test_the_order_of_clusters_their_numbers_and_the_unit_do_not_matter(rng, examples, unit):
    differences, tokens = heavy(rng, examples), rng.integers(1, 50, examples)
    cluster = rng.integers(0, examples, examples)
    found = gap(differences, tokens, cluster=cluster, resamples=FEW)
    renamed = gap(differences, tokens, cluster=7 * cluster - 1000, resamples=FEW)
    in_other_units = gap(differences, tokens * unit, cluster=cluster, resamples=FEW)

    assert found == renamed
    assert in_other_units.model_dump() == pytest.approx(found.model_dump(), rel=1e-6, abs=1e-12)


@quick
@given(pairs_drawn, st.floats(0.001, 0.3))
def test_a_larger_gain_is_never_less_sure(rng, more):
    differences = heavy(rng, 80)

    assert gap(differences - more, resamples=FEW).p_better <= gap(differences, resamples=FEW).p_better
    assert gap(differences - more, resamples=FEW).p_worse >= gap(differences, resamples=FEW).p_worse


def test_the_same_seed_gives_the_same_and_another_one_nearly_so():
    differences = heavy(np.random.default_rng(6), 500)

    assert gap(differences, seed=1) == gap(differences, seed=1)
    assert gap(differences, seed=1) != gap(differences, seed=2)
    assert gap(differences, seed=1).p_better == pytest.approx(gap(differences, seed=2).p_better, abs=0.02)


def test_how_many_resamples_are_held_at_once_does_not_matter(monkeypatch):
    differences = heavy(np.random.default_rng(7), 100)
    at_once = gap(differences, resamples=FEW)
    monkeypatch.setattr("job.core.judging.paired._AT_ONCE", 777)

    assert gap(differences, resamples=FEW).model_dump() == pytest.approx(at_once.model_dump())


# --- p-values mean what they say -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "clusters"),
    [
        (lambda rng: heavy(rng, 120), None),
        (lambda rng: rng.exponential(0.3, 120) - 0.3, None),
        (lambda rng: 0.3 - rng.exponential(0.3, 120), None),
        (lambda rng: np.repeat(heavy(rng, 40), 3) + heavy(rng, 120), np.repeat(np.arange(40), 3)),
    ],
    ids=["heavy tails", "rare losses", "rare gains", "clusters"],
)
def test_a_model_that_is_no_better_is_called_better_as_often_as_the_level_says(draw, clusters):
    """600 comparisons at 5 %: within three standard deviations of 30, or below."""
    rng = np.random.default_rng(8)
    called = [gap(draw(rng), cluster=clusters, resamples=FEW).p_better <= 0.05 for _ in range(600)]

    assert sum(called) <= 30 + 3 * np.sqrt(600 * 0.05 * 0.95)


def test_the_percentiles_of_the_mean_would_be_wrong_where_differences_are_skewed():
    """Rare losses: most samples lack them, and their mean looks better than it is. Why it is the bootstrap-t."""
    rng = np.random.default_rng(9)
    wrong = {"percentile": 0, "bootstrap-t": 0}
    for _ in range(400):
        differences = np.exp(rng.normal(0, 1.2, 60)) - np.exp(0.72)
        drawn = rng.integers(60, size=(FEW, 60))
        wrong["percentile"] += (1 + (differences[drawn].mean(axis=1) >= 0).sum()) / (FEW + 1) <= 0.02
        wrong["bootstrap-t"] += gap(differences, resamples=FEW).p_better <= 0.02

    assert wrong["percentile"] > 2 * wrong["bootstrap-t"]


def test_a_small_level_gets_the_resamples_that_show_it():
    """A fifteenth of an ordinary night's, as where a checkpoint was chosen from fifteen."""
    differences, level = heavy(np.random.default_rng(10), 60, sd=0.1) - 0.3, 1 / 526 / 15
    pairs = pairs_of(differences, np.zeros(60), np.ones(60))

    assert gap_at(pairs, level).p_better < level / 5
    assert gap_at(pairs, 0.01) == gap_at(pairs, 0.0) == gap_of(pairs)
    unsure = pairs_of(differences + 0.4, np.zeros(60), np.ones(60))
    assert gap_at(unsure, level) == gap_of(unsure), "it is far from any level"


def test_a_level_of_an_ordinary_night_is_within_reach_of_the_resamples():
    assert 20 / (RESAMPLES + 1) < 1 / 526
