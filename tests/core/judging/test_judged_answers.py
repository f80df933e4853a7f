"""Scores of both models, the gain and its paired interval, by source and by slice."""

import numpy as np
import pytest

from job.core.judging.answer_metrics import AnswerMetric
from job.core.judging.judged_answers import gain_of, metric_report
from job.core.judging.slices import slices_of


def test_the_gain_is_paired_and_so_surer_than_either_mean():
    """Both are right on the same half, and the tuned model on forty more."""
    draw = np.random.default_rng(0)
    base = (draw.random(400) < 0.5).astype(float)
    tuned = base.copy()
    tuned[np.flatnonzero(base == 0)[:40]] = 1
    found = gain_of(base, tuned)

    assert (found.examples, found.before) == (400, pytest.approx(base.mean()))
    assert found.gain == pytest.approx(0.1)
    assert found.low < 0.1 < found.high
    unpaired = 1.96 * np.sqrt(base.var() / 400 + tuned.var() / 400)
    assert found.high - found.low < unpaired


def test_the_interval_holds_the_true_gain_in_about_ninety_five_of_a_hundred_draws():
    draw, hit = np.random.default_rng(1), 0
    for _ in range(300):
        base = (draw.random(150) < 0.4).astype(float)
        tuned = np.where(draw.random(150) < 0.25, 1.0, base)  # of the 60 % that were wrong a quarter: 0.15
        found = gain_of(base, tuned, resamples=999)
        hit += found.low <= 0.15 <= found.high

    assert 0.91 < hit / 300 < 0.99


def test_too_few_examples_have_no_interval_even_where_all_agree():
    assert gain_of(np.zeros(5), np.ones(5)).low is None
    assert gain_of(np.zeros(5), np.zeros(5)).low is None
    all_of_many = gain_of(np.zeros(50), np.zeros(50))
    assert (all_of_many.low, all_of_many.high, all_of_many.gain) == (0, 0, 0)
    assert gain_of(np.zeros(0), np.zeros(0)) is None


def test_what_was_not_judged_counts_nowhere_and_each_slice_has_its_own():
    base, tuned = [0.0, None, 1.0, None, 0.0], [1.0, None, 1.0, None, 0.5]
    found = metric_report(
        AnswerMetric(name="rouge_l", field="summary"),
        base,
        tuned,
        asked=3 + 1,
        max_new_tokens=64,
        slices=slices_of("lang", ["de", "fr", "en", "en", "de"]),
    )

    assert (found.name, found.field, found.max_new_tokens, found.not_judged) == ("rouge_l", "summary", 64, 1)
    assert (found.scores.examples, found.scores.before, found.scores.after) == (
        3,
        pytest.approx(1 / 3, abs=1e-6),
        pytest.approx(2.5 / 3, abs=1e-6),
    )
    by_value = {each.slice.value: each.scores for each in found.slices}
    assert (by_value["de"].examples, by_value["de"].gain) == (2, 0.75)
    assert (by_value["en"].examples, by_value["en"].gain) == (1, 0)
    assert by_value["fr"] is None


def test_where_nothing_was_judged_there_is_no_metric():
    assert metric_report(AnswerMetric(), [None], [None], asked=0, max_new_tokens=8) is None
