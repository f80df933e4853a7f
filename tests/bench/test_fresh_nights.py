"""Nights of new records in short: what the table says in tens of thousands of channels shows in hundreds."""

import numpy as np
import pytest

from bench import fresh_nights
from bench.fresh_nights import EQUAL, LEVEL, Nights, differences, first_better, first_better_by_records

TOPIC_OF_THE_DAY = EQUAL[1]


@pytest.mark.parametrize("nights", EQUAL, ids=lambda nights: nights.name)
def test_models_that_are_equal_in_the_long_run_are(nights):
    nightly = differences(nights, 5000, np.random.default_rng(1))
    found = np.mean([next(nightly) for _ in range(100)], axis=0)

    assert found.mean() == pytest.approx(0, abs=4 * found.std() / np.sqrt(5000))


def test_a_topic_of_the_day_is_one_bet_a_night_and_would_be_thousands_of_wrong_ones():
    """At the level of 0.13 %: with each record as a bet, about a third are promoted within a fortnight."""
    assert (first_better(TOPIC_OF_THE_DAY, 2000, 60, 1) <= 60).mean() <= LEVEL + 3 * np.sqrt(LEVEL / 2000)
    assert (first_better_by_records(TOPIC_OF_THE_DAY, 60, 14, 1) <= 14).mean() > 0.1


def test_a_gain_is_seen_sooner_the_larger_it_is():
    half = [np.median(first_better(Nights(name="", gain=gain), 50, 200, 1)) for gain in (0.1, 0.05, 0.02)]

    assert half == sorted(half)
    assert 13 <= half[0] < half[2] < 100


def test_both_tables_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(fresh_nights, "OF_EACH_RECORD", 3)
    monkeypatch.setattr(fresh_nights, "GAINS", fresh_nights.GAINS[:2])
    fresh_nights.main(["--channels", "20", "--results", str(tmp_path / "R.md")])
    written = (tmp_path / "R.md").read_text()

    assert written.count("| a topic of the day") == 2
    assert written.count("| 0.1 | 0.02 |") == 2
    assert "python -m bench.fresh_nights --channels 20 --seed 0" in written
