"""Test, then train: evidence that may be looked at any night, that counts a night once, and that reads strictly."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.judging.paired import pairs_of
from job.core.nightly.fresh_evidence import (
    BETS,
    CLIPPED_NATS,
    MOST_NIGHTS,
    FreshEvidence,
    log_capitals,
    read_fresh_evidence,
    with_night,
    worth_keeping,
)

quick = settings(deadline=None, derandomize=True, database=None, max_examples=40)


def begun(**values):
    return FreshEvidence(**{"challenger": "run-2", "champion": "run-1", "level": 0.001, "full_tokens": 10.0} | values)


def records(differences, tokens=10, cluster=None):
    """Of a challenger whose losses a token differ by this."""
    differences = np.asarray(differences, dtype=np.float64)
    weight = np.broadcast_to(np.asarray(tokens, dtype=np.float64), differences.shape)
    return pairs_of(differences * weight, np.zeros(len(weight)), weight, cluster)


def heavy(rng, count):
    return rng.standard_t(4, count) / np.sqrt(2) * 0.3


# --- exact cases -----------------------------------------------------------------------------------------------------


def test_it_begins_at_one_on_either_side():
    assert (begun().e_better, begun().e_worse, begun().is_better) == (1, 1, False)


def test_one_record_pays_what_was_bet_on_it():
    found = with_night(begun(), "monday", records([-0.5]))

    assert found.e_better == pytest.approx(1 + 0.5 * np.mean(BETS))
    assert found.e_worse == pytest.approx(1 - 0.5 * np.mean(BETS))
    assert (found.records, found.nights) == (1, ("monday",))


def test_a_record_counts_with_at_most_a_nat_a_token_and_at_most_its_full_weight():
    clipped = with_night(begun(), "a", records([-CLIPPED_NATS], 10))

    assert with_night(begun(), "a", records([-50.0], 10)) == clipped
    assert with_night(begun(), "a", records([-CLIPPED_NATS], 1000)) == clipped
    assert with_night(begun(), "a", records([-CLIPPED_NATS], 5)).e_better == pytest.approx(1 + 0.5 * np.mean(BETS))


def test_records_of_one_cluster_make_one_bet():
    """Ten of one customer are one record with their mean."""
    together = with_night(begun(), "a", records([-0.2] * 10, cluster=np.zeros(10, dtype=np.int64)))

    assert together.better == with_night(begun(), "a", records([-0.2], 100)).better
    assert together.records == 10


def test_a_gain_below_the_margin_is_no_gain():
    found = with_night(begun(margin=0.01), "a", records([-0.01] * 500))

    assert found.e_better == pytest.approx(1)
    assert found.e_worse < 1


def test_identical_models_say_nothing_for_ever():
    found = begun()
    for night in range(50):
        found = with_night(found, str(night), records(np.zeros(100)))

    assert (found.e_better, found.e_worse) == (1, 1)


def test_a_real_gain_is_seen_within_a_week_and_a_loss_as_well():
    rng, found, lost = np.random.default_rng(1), begun(), begun()
    for night in range(6):
        found = with_night(found, str(night), records(heavy(rng, 300) - 0.05))
        lost = with_night(lost, str(night), records(heavy(rng, 300) + 0.05))

    assert found.is_better
    assert found.e_worse < 0.1
    assert lost.e_worse > 1000
    assert not lost.is_better


def test_nothing_is_enough_where_nothing_was_paid():
    assert not with_night(begun(level=0.0), "a", records(np.full(500, -1.0))).is_better


def test_evidence_beyond_all_numbers_stays_a_number():
    found = with_night(begun(), "a", records(np.full(5000, -1.0)))

    assert found.e_better == 1e300
    assert 0 <= found.e_worse < 1e-100
    assert read_fresh_evidence(json.loads(found.model_dump_json())) == found


# --- properties ------------------------------------------------------------------------------------------------------

differences = st.lists(st.floats(-3, 3), min_size=1, max_size=40)


@quick
@given(differences, st.integers(0, 40))
def test_neither_the_order_of_records_nor_how_nights_divide_them_matters(found, cut):
    whole = with_night(begun(), "a", records(found))
    divided = begun()
    for night, part in (("b", found[:cut]), ("c", found[cut:])):
        divided = with_night(divided, night, records(part)) if part else divided
    backwards = with_night(begun(), "a", records(found[::-1]))

    assert (divided.better, divided.worse) == (pytest.approx(whole.better), pytest.approx(whole.worse))
    assert backwards.better == pytest.approx(whole.better)
    assert divided.records == whole.records == len(found)


@quick
@given(differences, differences)
def test_a_night_counts_once(found, other):
    """A night that is started again, even if the store brought its records otherwise."""
    once = with_night(begun(), "a", records(found))

    assert with_night(once, "a", records(other)) == once


@quick
@given(differences, st.floats(0, 0.2))
def test_it_travels_as_json(found, margin):
    evidence = with_night(begun(margin=margin), "a", records(found))

    assert read_fresh_evidence(json.loads(evidence.model_dump_json())) == evidence


@quick
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_the_fair_bet_pays_one_on_average(gains):
    """Exact: over all ways to turn the records' signs, the mean of e is 1, and so it is a martingale."""
    gains = np.array(gains[:8])
    signs = 1 - 2 * ((np.arange(2 ** len(gains))[:, None] >> np.arange(len(gains))) & 1)
    capitals = np.exp(log_capitals(signs * gains)).mean(axis=1)

    assert capitals.mean() == pytest.approx(1)


def test_a_challenger_that_is_no_better_is_hardly_ever_taken_for_better_however_often_one_looks():
    """Ville: at a level of 5 %, looked at after each of 60 nights, at most 5 % of 2,000 challengers."""
    rng = np.random.default_rng(2)
    capitals, ever = np.zeros((2000, len(BETS))), np.zeros(2000, dtype=bool)
    for _ in range(60):
        capitals += log_capitals(np.clip(heavy(rng, (2000, 40)), -1, 1))
        ever |= np.exp(capitals).mean(axis=1) >= 1 / 0.05

    assert 0.01 < ever.mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_those_with_the_most_evidence_go_on_waiting_and_of_equals_the_newest():
    found = [begun(challenger=name, better=(log,) * len(BETS)) for name, log in zip("abcd", [0, 2, -1, 0], strict=True)]

    assert [each.challenger for each in worth_keeping(found)] == ["b", "d", "a"]
    assert [each.challenger for each in worth_keeping(found[:1])] == ["a"]


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_challenger_does_not_wait_for_ever():
    found = begun(nights=tuple(map(str, range(MOST_NIGHTS))))

    with pytest.raises(ValueError, match=f"has waited {MOST_NIGHTS} nights"):
        with_night(found, "another", records([0.1]))


def wrong(**changes):
    return {**json.loads(with_night(begun(), "a", records([0.1])).model_dump_json()), **changes}


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({}, "challenger"),
        (wrong(version=2), "version"),
        (wrong(more=1), "more"),
        (wrong(level=1.5), "level"),
        (wrong(level=float("nan")), "level"),
        (wrong(full_tokens=0.0), "full_tokens"),
        (wrong(margin=-0.1), "margin"),
        (wrong(records=-1), "records"),
        (wrong(better=[0.0] * (len(BETS) - 1)), "better"),
        (wrong(better=[float("inf")] * len(BETS)), "better"),
        (wrong(worse=["0"] * len(BETS)), "worse"),
        (wrong(nights=["a"] * (MOST_NIGHTS + 1)), "nights"),
        (wrong(nights=["a", "a"]), "nights"),
        (wrong(nights=[""]), "nights"),
    ],
)
def test_what_is_no_evidence_is_refused_with_the_place(content, where):
    with pytest.raises(ValueError, match=where):
        read_fresh_evidence(content)
