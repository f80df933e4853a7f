"""What a report keeps of the held-out examples: intervals, losses one by one, and those far from the others."""

import numpy as np
import pytest

from job.core.judging.held_out import MOST_DRAWN, held_out, loss_of_example, plus_minus, tried
from job.core.judging.verdict import Evaluation


def evaluation(step, losses, tokens):
    tokens = np.asarray(tokens, dtype=np.int64)
    return Evaluation(step=step, nll=np.asarray(losses, dtype=np.float64) * tokens, tokens=tokens, correct=0)


def where(place):
    return f"valid.jsonl:{place + 1}"


def test_the_gain_is_the_difference_of_both_losses_weighted_by_tokens():
    found = held_out(
        {0: evaluation(0, [2.0, 1.0], [1, 3]), 5: evaluation(5, [1.0, 1.0], [1, 3])}, chosen=5, where=where
    )

    assert found.gain == pytest.approx(0.25)
    assert found.base == (2.0, 1.0)
    assert found.tuned == (1.0, 1.0)


def test_half_an_interval_holds_the_true_mean_in_ninety_five_of_a_hundred_draws():
    draw = np.random.default_rng(0)
    hit = 0
    for _ in range(2000):
        tokens = draw.integers(1, 50, 200)
        nll = draw.gamma(2.0, 0.5, 200) * tokens  # a mean of 1.0 a token
        hit += abs(nll.sum() / tokens.sum() - 1.0) <= plus_minus(nll, tokens)

    assert 0.93 < hit / 2000 < 0.97


def test_examples_of_one_mind_make_no_interval_and_one_alone_knows_none():
    tokens = np.array([4, 9, 2])

    assert plus_minus(1.5 * tokens, tokens) == pytest.approx(0.0, abs=1e-6)
    assert plus_minus(np.array([3.0]), np.array([2])) is None


def test_the_gain_is_known_better_than_either_loss():
    """Easy and hard examples cancel out where both are judged on the same ones."""
    hard = np.random.default_rng(1).gamma(2.0, 0.5, 400)
    tokens = np.full(400, 10)
    found = held_out({0: evaluation(0, hard, tokens), 9: evaluation(9, hard - 0.1, tokens)}, chosen=9, where=where)

    assert found.gain == pytest.approx(0.1)
    assert found.gain_plus_minus < 0.01 < min(found.plus_minus)


def test_an_example_with_a_wrong_label_lies_far_from_the_others_and_is_named():
    draw = np.random.default_rng(2)
    base = draw.normal(2.0, 0.2, 100)
    tuned = base - 1.5 + draw.normal(0, 0.05, 100)
    tuned[[13, 70]] = base[[13, 70]] + [0.5, 1.0]
    found = held_out({0: evaluation(0, base, [5] * 100), 9: evaluation(9, tuned, [5] * 100)}, chosen=9, where=where)

    assert [each.where for each in found.outliers[:2]] == ["valid.jsonl:71", "valid.jsonl:14"]
    assert found.worse == 2
    assert found.outliers[0].tuned - found.outliers[0].base == pytest.approx(1.0)


def test_where_the_base_is_kept_the_best_trained_step_is_compared_with_it_example_by_example():
    """Against itself there would be nothing to look at."""
    judged = {
        0: evaluation(0, [1.0, 1.0, 1.0], [1, 1, 2]),
        5: evaluation(5, [0.5, 1.0, 2.0], [1, 1, 2]),
        9: evaluation(9, [2.0, 2.0, 2.0], [1, 1, 2]),
    }
    found = tried(judged, chosen=0, where=where)

    assert (found.step, found.gain, found.worse) == (5, pytest.approx(-0.375), 1)
    assert (found.base, found.tuned) == ((1.0, 1.0, 1.0), (0.5, 1.0, 2.0))
    assert found.gain_plus_minus == plus_minus(np.array([0.5, 0.0, -2.0]), np.array([1, 1, 2]))
    assert tried(judged, chosen=5, where=where) is None
    assert tried({0: judged[0]}, chosen=0, where=where) is None
    assert held_out(judged, chosen=0, where=where).tuned == (1.0, 1.0, 1.0)


def test_of_many_examples_as_many_are_kept_as_a_picture_shows_evenly_from_all():
    losses = np.arange(2500) / 2500
    tokens = [1] * 2500
    found = held_out({0: evaluation(0, losses, tokens), 1: evaluation(1, losses, tokens)}, chosen=1, where=where)

    assert found.examples == 2500
    assert len(found.base) == len(found.tuned) == MOST_DRAWN
    assert np.allclose(np.diff(found.base), 2.5 / 2500, atol=0.6 / 2500)


def test_at_most_twelve_outliers_are_named_and_all_are_counted():
    base = np.full(200, 2.0)
    tuned = np.full(200, 0.5)
    tuned[:20] = 3.0
    found = held_out({0: evaluation(0, base, [3] * 200), 1: evaluation(1, tuned, [3] * 200)}, chosen=1, where=where)

    assert (len(found.outliers), found.outliers_in_all) == (12, 20)


def test_the_loss_of_an_example_is_a_token_s():
    assert loss_of_example(evaluation(0, [2.5, 0.5], [4, 8]), 1) == 0.5
