"""The years of nightly promotions in short: seconds of what the whole simulation shows in minutes."""

from statistics import NormalDist

import numpy as np
import pytest

from bench import nightly_years
from bench.nightly_years import (
    _CLUSTER,
    _NEAR,
    _TOKENS,
    EXAMPLES,
    NEW_RECORDS,
    SD,
    WORLDS,
    Channels,
    World,
    deviations,
    live,
    t_of,
)
from job.core.judging.paired import gap_of, pairs_of
from job.core.nightly.error_budget import quiet_level
from job.core.nightly.gate import shares_of

T_TEST = "equal models, a t-test at 5 % each night"


def pairs(difference):
    return pairs_of(difference * _TOKENS, np.zeros(EXAMPLES), _TOKENS, _CLUSTER)


def test_the_difference_of_two_models_has_the_spread_and_the_tails_that_are_asked_for():
    rng = np.random.default_rng(1)
    found = deviations(rng, 400) - deviations(rng, 400)

    assert found.std() == pytest.approx(SD, rel=0.02)
    assert (found**4).mean() / found.var() ** 2 > 4  # a normal one has 3


def test_the_quick_t_is_the_product_s():
    difference = deviations(np.random.default_rng(2), 3).astype(np.float64)
    gaps = [gap_of(pairs(row), resamples=99) for row in difference]

    assert t_of(difference) == pytest.approx([gap.mean / gap.standard_error for gap in gaps], rel=1e-4)


def test_what_the_quick_t_passes_over_is_never_promoted():
    """As near to the border as they come: the bootstrap finds none of them significant."""
    level, _ = shares_of(quiet_level(1.0))
    border = NormalDist().inv_cdf(level) + _NEAR
    rng = np.random.default_rng(3)
    drawn = (deviations(rng, 60) - deviations(rng, 60)).astype(np.float64)
    t = t_of(drawn)
    at_the_border = [
        row + (border - of_row) * gap_of(pairs(row), resamples=99).standard_error
        for row, of_row in zip(drawn, t, strict=True)
    ]

    assert min(gap_of(pairs(row), resamples=4000).p_better for row in at_the_border) > level


def means_of_two_nights(world):
    """By which two models differ on a night's new records, and on the next night's."""
    channels = Channels(world, 2000, 1)
    return [np.subtract(*channels._on_new_records().mean(axis=2).T[:2]) for _ in range(2)]


@pytest.mark.parametrize("topic", [0.0, 0.02])
def test_a_topic_moves_a_night_s_new_records_together_and_the_next_night_s_otherwise(topic):
    tonight, tomorrow = means_of_two_nights(World(name="topics", topic=topic))

    assert tonight.std() == pytest.approx(np.hypot(topic, SD / np.sqrt(NEW_RECORDS)), rel=0.06)
    assert np.corrcoef(tonight, tomorrow)[0, 1] == pytest.approx(0, abs=0.07)


def test_customers_who_come_back_move_the_next_night_in_the_same_way():
    tonight, tomorrow = means_of_two_nights(World(name="customers", returning=0.5))
    of_customers, of_records = 0.1 * SD**2 / 20, 0.9 * SD**2 / NEW_RECORDS

    assert tonight.var() == pytest.approx(of_customers + of_records, rel=0.1)
    foreseen = 0.5 * of_customers / (of_customers + of_records)
    assert np.corrcoef(tonight, tomorrow)[0, 1] == pytest.approx(foreseen, abs=0.07)


def test_topics_of_the_day_do_not_promote_those_that_wait():
    """Larger ones than in the table, so that as independent records they would promote most channels' challengers."""
    found = live(World(name="topics", topic=0.1), 40, 20, 1)
    expected = shares_of(found.paid.sum())[1]

    assert found.by_fresh <= expected + 3 * np.sqrt(expected)


def test_models_that_wander_go_on_from_the_model_in_use():
    """Step by step; around the first model there would be one or two steps at most."""
    found = live(World(name="wander", wander=0.1, anew=True), 4, 16, 1)

    assert found.right.mean() > 3


def test_what_a_channel_does_is_the_row_of_most_years():
    first = WORLDS[0]

    assert (first.name, first.anew, first.years) == ("equal models, one frozen set", False, None)


def test_equal_models_are_promoted_as_seldom_as_the_budget_says():
    """Of 100 channels, 40 nights each: what their levels add up to is the most that is expected."""
    found = live(World(name="equal", anew=True), 100, 40, 1)
    expected = found.paid.sum()

    assert found.wrong.sum() <= expected + 3 * np.sqrt(expected)
    assert found.drift.max() == 0


def test_a_test_at_five_per_cent_each_night_would_promote_ten_times_as_many():
    found = live(World(name="t-test", anew=True, gate=False), 100, 40, 1)

    assert found.wrong.sum() > 150


def test_a_true_gain_is_in_use_within_a_week():
    """30 nights of equal models, then seven of better ones."""
    found = live(World(name="gain", gain=0.05, anew=True), 10, 37, 1)

    assert found.gained.sum() >= 9


def test_small_steps_down_do_not_add_up():
    """Flattered by the frozen examples, nearly each would be promoted, and all together would be 0.14 nat."""
    found = live(World(name="flattered", step=0.01, flattered=0.08, anew=True), 2, 14, 1)

    assert found.wrong.sum() > 0
    assert found.drift.max() <= 0.05


def test_the_same_seed_gives_the_same_years():
    world = World(name="retrained", spread=0.05)
    first, again, other = (live(world, 4, 6, seed) for seed in (1, 1, 2))

    assert (first.wrong.tolist(), first.drift.tolist()) == (again.wrong.tolist(), again.drift.tolist())
    assert first.drift.tolist() != other.drift.tolist() or first.right.tolist() != other.right.tolist()


def test_the_table_is_written(tmp_path):
    results = tmp_path / "R.md"
    options = ["--years", "6", "--nights", "5", "--workers", "1", "--results", str(results)]
    nightly_years.main(options, [world for world in WORLDS if world.name in ("equal models", T_TEST)])
    rows = [line for line in results.read_text().splitlines() if line.startswith("| equal")]

    assert [row.split(" | ")[1] for row in rows] == ["6 x 5", "6 x 5"]
    assert "python -m bench.nightly_years --years 6 --nights 5 --seed 0" in results.read_text()
