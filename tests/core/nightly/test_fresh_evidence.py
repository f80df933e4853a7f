"""Test, then train: evidence that may be looked at any night, that counts a night once, and that reads strictly."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.judging.paired import gap_of, pairs_of
from job.core.nightly.error_budget import MOST_LEVEL, quiet_level
from job.core.nightly.fresh_evidence import (
    BETS,
    BOUND_NATS,
    FULL_RECORDS,
    MOST_NIGHTS,
    SIGN_ERRORS,
    FreshEvidence,
    errors_of,
    log_growth,
    read_fresh_evidence,
    with_night,
    worth_keeping,
)
from job.core.nightly.gate import shares_of

quick = settings(deadline=None, derandomize=True, database=None, max_examples=40)


def begun(**values):
    return FreshEvidence(**{"challenger": "run-2", "champion": "run-1", "level": 0.001} | values)


def records(differences, tokens=10, cluster=None):
    """Of a challenger whose losses a token differ by this."""
    differences = np.asarray(differences, dtype=np.float64)
    weight = np.broadcast_to(np.asarray(tokens, dtype=np.float64), differences.shape)
    return pairs_of(differences * weight, np.zeros(len(weight)), weight, cluster)


def heavy(rng, count):
    return rng.standard_t(4, count) / np.sqrt(2) * 0.3


# --- exact cases -----------------------------------------------------------------------------------------------------

EACH_HALF = records([-BOUND_NATS / 2] * FULL_RECORDS)


def test_it_begins_at_one_on_either_side():
    assert (begun().e_better, begun().e_worse, begun().is_better) == (1, 1, False)


def test_a_night_is_one_bet_however_many_records_it_has_and_however_they_depend():
    found = with_night(begun(), "monday", EACH_HALF)
    of_one_customer = records([-BOUND_NATS / 2] * 5000, cluster=np.zeros(5000, dtype=np.int64))

    assert found.e_better == pytest.approx(1 + 0.5 * np.mean(BETS))
    assert found.e_worse == pytest.approx(1 - 0.5 * np.mean(BETS))
    assert (found.records, found.nights, found.largest) == (FULL_RECORDS, ("monday",), pytest.approx(BOUND_NATS / 2))
    assert with_night(begun(), "monday", of_one_customer).better == pytest.approx(found.better)


def test_every_token_of_a_night_counts_the_same():
    """Half of the tokens are 0.1 nat better, in a tenth of the records."""
    long, short = 90, 10
    found = with_night(begun(), "a", records([-0.1] * 100 + [0.0] * 900, [long] * 100 + [short] * 900))

    assert found.largest == pytest.approx(0.05)


def test_few_records_or_few_long_ones_count_less():
    quarter = with_night(begun(), "a", records([-BOUND_NATS] * (FULL_RECORDS // 4)))
    few_long = with_night(begun(), "a", records([-BOUND_NATS] * 2050, [1e6] * (FULL_RECORDS // 4) + [1e-6] * 2000))

    assert quarter.e_better == pytest.approx(1 + 0.5 * np.mean(BETS))
    assert few_long.better == pytest.approx(quarter.better)


def test_a_night_counts_with_at_most_the_bound_or_the_largest_difference_before():
    at_the_bound = with_night(begun(), "a", records([-BOUND_NATS] * FULL_RECORDS))
    far_beyond = with_night(begun(), "a", records([-50.0] * FULL_RECORDS))
    then = with_night(far_beyond, "b", records([-5.0] * FULL_RECORDS))

    assert far_beyond.better == pytest.approx(at_the_bound.better)
    assert (at_the_bound.largest, far_beyond.largest) == (pytest.approx(BOUND_NATS), pytest.approx(50))
    assert np.exp(np.array(then.better) - far_beyond.better) == pytest.approx(1 + 0.1 * np.array(BETS))
    assert (then.largest, len(then.nights)) == (far_beyond.largest, 2)


def test_a_gain_below_the_margin_is_no_gain():
    found = with_night(begun(margin=0.01), "a", records([-0.01] * 500))

    assert found.e_better == pytest.approx(1)
    assert found.e_worse < 1


def test_identical_models_say_nothing_for_ever():
    found = begun()
    for night in range(50):
        found = with_night(found, str(night), records(np.zeros(100)))

    assert (found.e_better, found.e_worse) == (1, 1)


def test_a_real_gain_is_seen_within_a_month_and_a_loss_as_well():
    rng, found, lost = np.random.default_rng(1), begun(), begun()
    for night in range(30):
        topic = 0.02 * rng.standard_normal()
        found = with_night(found, str(night), records(heavy(rng, 200) + topic - 0.05))
        lost = with_night(lost, str(night), records(heavy(rng, 200) + topic + 0.05))

    assert found.is_better
    assert found.e_worse < 0.1
    assert lost.e_worse > 1000
    assert not lost.is_better


@pytest.mark.parametrize(("level", "enough", "best"), [(quiet_level(1.0), 8420, 17), (MOST_LEVEL, 100, 9)])
def test_the_best_nights_take_nine_to_seventeen_to_be_enough(level, enough, best):
    """As the docstring and docs/nightly.md say: of a challenger of a night that saved, and of one that had the most."""
    found, nights = begun(level=shares_of(level)[1]), 0
    while not found.is_better:
        found, nights = with_night(found, str(nights), records(np.full(500, -1.0), 10)), nights + 1

    assert nights == best
    assert 1 / found.level == pytest.approx(enough, abs=0.5)


def test_nothing_is_enough_where_nothing_was_paid():
    assert not with_night(begun(level=0.0), "a", records(np.full(500, -1.0))).is_better


def test_evidence_beyond_all_numbers_stays_a_number():
    found = begun(better=(2000.0,) * len(BETS), worse=(-2000.0,) * len(BETS))
    found = with_night(found, "a", EACH_HALF)

    assert (found.e_better, found.e_worse) == (1e300, 0)
    assert read_fresh_evidence(json.loads(found.model_dump_json())) == found


# --- properties ------------------------------------------------------------------------------------------------------

differences = st.lists(st.floats(-3, 3), min_size=1, max_size=40)


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


def expected(gains, chances):
    """Mean of e over all that a night may bring, [outcomes], night after night: [nights, outcomes] each."""
    mean = 0.0
    for each in itertools.product(range(gains.shape[1]), repeat=len(gains)):
        logs, largest = np.zeros(len(BETS)), 0.0
        for gain in gains[range(len(gains)), each]:
            logs, largest = logs + log_growth(gain, largest), max(largest, abs(gain))
        mean += np.exp(logs).mean() * chances[range(len(gains)), each].prod()
    return mean


@quick
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_the_fair_bet_pays_one_on_average(gains):
    """Exact: where a night may as well have gone the other way, by however much, e is a martingale."""
    either_way = np.outer(gains, [1, -1])

    assert expected(either_way, np.full(either_way.shape, 0.5)) == pytest.approx(1)


@quick
@given(st.lists(st.tuples(st.floats(0.001, 3), st.floats(0.001, BOUND_NATS)), min_size=1, max_size=7))
def test_a_skewed_one_pays_no_more_where_no_loss_exceeds_the_bound(nights):
    """Exact: gains of any size that losses within the bound make up for."""
    gains = np.array([(gain, -loss) for gain, loss in nights])
    chances = np.array([(loss / (gain + loss), gain / (gain + loss)) for gain, loss in nights])

    assert (gains * chances).sum(axis=1) == pytest.approx(0)
    assert expected(gains, chances) <= 1 + 1e-9


def at_most(level, challengers):
    return level + 3 * math.sqrt(level * (1 - level) / challengers)


def test_equal_models_that_differ_by_the_topic_of_the_day_are_hardly_ever_taken_for_better():
    """Each night moves all its records together: as 2,000 bets a night, half of them would be promoted."""
    rng, found = np.random.default_rng(2), 0
    for _ in range(60):
        evidence = begun(level=0.05)
        for night in range(14):
            topic = 0.02 * rng.standard_normal()
            evidence = with_night(evidence, str(night), records(0.3 * rng.standard_normal(2000) + topic))
            if evidence.is_better:
                found += 1
                break

    assert found / 60 <= at_most(0.05, 60)


@pytest.mark.parametrize("spread", [0.03, 0.1, 1.0])
def test_a_challenger_that_is_no_better_is_hardly_ever_taken_for_better_however_often_one_looks(spread):
    """Ville: at a level of 5 %, looked at after each of 365 nights, at most 5 % of 2,000 challengers; and not never."""
    rng = np.random.default_rng(2)
    logs, largest, ever = np.zeros((2000, len(BETS))), np.zeros(2000), np.zeros(2000, dtype=bool)
    for _ in range(365):
        gain = spread * rng.standard_normal(2000)
        logs += log_growth(gain, largest)
        largest = np.maximum(largest, abs(gain))
        ever |= np.exp(logs).mean(axis=1) >= 1 / 0.05

    assert 0.01 < ever.mean() <= at_most(0.05, 2000)


def test_the_newest_goes_on_waiting_and_those_with_the_most_evidence_and_of_equals_the_newer():
    logs = [0, 2, -1, 0, 1, -2]
    found = [begun(challenger=name, better=(log,) * len(BETS)) for name, log in zip("abcdef", logs, strict=True)]

    assert [each.challenger for each in worth_keeping(found)] == ["b", "e", "f"], "the newest has the least"
    assert [each.challenger for each in worth_keeping(found[:4])] == ["b", "d", "a"]
    assert [each.challenger for each in worth_keeping(found[:1])] == ["a"]
    assert worth_keeping([]) == ()


# --- which nights speak for a challenger -----------------------------------------------------------------------------


def test_a_night_s_errors_are_those_that_the_frozen_examples_would_have():
    rng = np.random.default_rng(3)
    pairs = records(heavy(rng, 300) - 0.05, rng.integers(5, 80, 300))
    gap = gap_of(pairs, resamples=99)
    evidence = with_night(begun(margin=0.01), "a", pairs)

    assert evidence.last == pytest.approx((gap.mean + 0.01) / gap.standard_error)


def test_one_night_in_two_hundred_speaks_for_a_challenger_that_is_no_better():
    rng = np.random.default_rng(4)
    tokens = rng.integers(5, 80, (20_000, 200))
    speaks = errors_of(0.3 * rng.standard_normal(tokens.shape) * tokens, tokens) <= -SIGN_ERRORS

    assert speaks.mean() == pytest.approx(1 / 200, abs=0.002)


def test_only_the_last_night_speaks():
    good, nothing = records(np.linspace(-0.2, 0.1, 50)), records(np.linspace(-0.2, 0.2, 50))
    found = with_night(begun(), "a", good)
    then = with_night(found, "b", nothing)

    assert (begun().speaks, found.speaks, then.speaks) == (False, True, False)
    assert read_fresh_evidence(json.loads(found.model_dump_json())) == found


def test_a_few_records_and_models_that_do_not_differ_speak_for_none():
    assert with_night(begun(), "a", records([-0.2, -0.1] * 9)).last is None
    assert with_night(begun(), "a", records(np.zeros(50))).last is None
    assert with_night(begun(margin=0.01), "a", records(np.zeros(50))).last is None


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_challenger_does_not_wait_for_ever():
    found = begun(nights=tuple(map(str, range(MOST_NIGHTS))))

    with pytest.raises(ValueError, match=f"has waited {MOST_NIGHTS} nights"):
        with_night(found, "another", records([0.1]))


OF_VERSION_1 = {
    "version": 1,
    "challenger": "run-2",
    "champion": "run-1",
    "level": 0.002,
    "full_tokens": 24.0,
    "margin": 0.01,
    "records": 4000,
    "nights": ["a", "b"],
    "better": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "worse": [-1.0] * 8,
}
"""As it stands in a channel from before a night was one bet."""


def test_what_was_won_by_bets_on_single_records_is_worth_nothing_and_the_challenger_begins_anew():
    found = read_fresh_evidence(OF_VERSION_1)

    assert found == begun(level=0.002, margin=0.01)
    assert (found.version, found.e_better, found.records) == (2, 1, 0)
    assert read_fresh_evidence(json.loads(found.model_dump_json())) == found


def wrong(**changes):
    return {**json.loads(with_night(begun(), "a", records([0.1])).model_dump_json()), **changes}


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({}, "challenger"),
        (wrong(version=3), "version"),
        (wrong(more=1), "more"),
        (wrong(level=1.5), "level"),
        (wrong(level=float("nan")), "level"),
        (wrong(largest=-0.1), "largest"),
        (OF_VERSION_1 | {"level": 2.0}, "level"),
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
