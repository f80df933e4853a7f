"""When a merged model is the one that was judged: the limits follow the loss and what training gained."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.core.reports.export import LEAST, ExportLosses, limits_of, refusal

LOSS = st.floats(min_value=1e-4, max_value=12)


def losses(*, merged, unmerged=1.0, reported=1.0, base=1.4):
    return ExportLosses(
        examples=10, of_examples=10, tokens=100, merged=merged, unmerged=unmerged, reported=reported, base=base
    )


def test_the_same_loss_is_the_same_model():
    assert refusal(losses(merged=1.0), "weights") is None
    assert refusal(losses(merged=1.0), "quantised") is None


@pytest.mark.parametrize("away", [-0.02, 0.02])
def test_a_merge_that_is_another_model_than_its_parts_is_refused(away):
    """Better or worse: either way it is not what was merged."""
    reason = refusal(losses(merged=1 + away), "weights")

    assert reason is not None
    assert "they may differ by 0.0102" in reason
    assert "serve it beside its base" in reason
    assert refusal(losses(merged=1 + away / 4), "weights") is None


def test_what_was_trained_on_4_bits_may_not_be_much_worse_on_the_bases_own_weights():
    worse = losses(merged=1.05, unmerged=1.05)
    reason = refusal(worse, "weights")

    assert reason is not None
    assert "--onto quantised" in reason
    assert "worse by 0.0400" in reason
    assert refusal(losses(merged=1.03, unmerged=1.03), "weights") is None


def test_better_than_reported_is_never_refused_for_it():
    assert refusal(losses(merged=0.5, unmerged=0.5), "weights") is None


def test_merged_onto_quantised_is_held_to_what_was_reported():
    assert refusal(losses(merged=1.03, unmerged=1.03), "quantised") is not None
    assert refusal(losses(merged=1.0, unmerged=1.3), "quantised") is None
    assert limits_of(losses(merged=1.0), "quantised").quantisation is None


@given(LOSS, LOSS, LOSS, LOSS)
def test_limits_are_no_larger_than_what_they_are_a_share_of(merged, unmerged, reported, base):
    found = losses(merged=merged, unmerged=unmerged, reported=reported, base=base)
    limits = limits_of(found, "weights")

    assert 0 < limits.rounding <= 0.01 * unmerged + 0.0005 * max(0.0, base - reported) + 1e-12
    assert LEAST <= limits.quantisation <= max(LEAST, 0.1 * reported)
    refused = refusal(found, "weights") is not None
    assert refused == (abs(merged - unmerged) > limits.rounding or merged - reported > limits.quantisation)


def test_nothing_that_training_lost_widens_a_limit():
    """A run that kept step 0 has gained nothing."""
    assert limits_of(losses(merged=1.0, base=0.5), "weights") == limits_of(losses(merged=1.0, base=1.0), "weights")
