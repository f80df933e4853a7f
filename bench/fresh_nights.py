"""Nights of new records, simulated: how soon they show a gain, and how often one that is none.

    python -m bench.fresh_nights [--channels 20000] [--seed 0] [--results bench/RESULTS.md]

One challenger waits beside one champion, and each night bets on it as in `job.core.nightly.fresh_evidence`, at the
level that it has in a channel that is judged each night. A night's difference is drawn as a whole: a part that its
records share, and the mean of what they do not, of 0.3 nat a record.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from bench.results import RESULTS, table, versions, write_section
from job.core.nightly.error_budget import WRONG_PER_YEAR, quiet_level
from job.core.nightly.fresh_evidence import BETS, log_growth
from job.core.nightly.gate import shares_of

LEVEL = shares_of(quiet_level(WRONG_PER_YEAR))[1]
SD = 0.3
"""Nats a token, of the difference of two models on a record, but for what the night's records share."""
TOPIC = 0.02
"""Standard deviation of what they share."""
FORTNIGHT, YEAR = 14, 365
MOST = 1000
"""Nights for which a gain is waited for: beyond what a channel keeps."""
OF_EACH_RECORD = 500
"""Channels whose records are drawn one by one."""


@dataclass(frozen=True, kw_only=True)
class Nights:
    """How nights differ."""

    name: str
    gain: float = 0.0
    """Nats a token by which the challenger is truly better."""
    records: int = 2000
    topic: float = TOPIC
    stays: float = 0.0
    """Chance that a night has the topic of the night before."""
    bad: tuple[float, float] | None = None
    """Chance of a night that is worse, and nats a token by which; the others are as much better as makes up for it."""


EQUAL = (
    Nights(name="independent records", topic=0.0, records=200),
    Nights(name="a topic of the day"),
    Nights(name="a topic that is the next night's as well, one time in two", stays=0.5),
    Nights(name="a topic that lasts for a week on average", stays=6 / 7),
    Nights(name="one night in 20 is 0.1 worse, the others a little better", topic=0.0, bad=(0.05, 0.1)),
    Nights(name="one night in 50 is 0.5 worse, the others a little better", topic=0.0, bad=(0.02, 0.5)),
)
"""In the long run one model is as good as the other."""
GAINS = tuple(
    Nights(name="", gain=gain, records=records, topic=topic)
    for gain in (0.1, 0.05, 0.02, 0.01)
    for topic in (TOPIC, 0.0)
    for records in (200, 2000)
)


def differences(nights, channels, rng):
    """Of one night after another, by which the challenger is better: [C] each."""
    topic = rng.standard_normal(channels)
    while True:
        yield (
            nights.gain
            + nights.topic * topic
            + _bad(nights, channels, rng)
            + SD / math.sqrt(nights.records) * rng.standard_normal(channels)
        )
        topic = np.where(rng.random(channels) < nights.stays, topic, rng.standard_normal(channels))


def _bad(nights, channels, rng):
    if nights.bad is None:
        return 0.0
    chance, loss = nights.bad
    return np.where(rng.random(channels) < chance, -loss, loss * chance / (1 - chance))


def first_better(nights, channels, most, seed):
    """The night on which each challenger is taken for better, from 1; infinite where it is not within `most`: [C]."""
    rng = np.random.default_rng(seed)
    logs, largest = np.zeros((channels, len(BETS))), np.zeros(channels)
    first = np.full(channels, np.inf)
    for night, gain in zip(range(1, most + 1), differences(nights, channels, rng), strict=False):
        logs += log_growth(gain, largest)
        largest = np.maximum(largest, abs(gain))
        is_better = np.exp(np.minimum(logs, 100)).mean(axis=1) >= 1 / LEVEL
        first = np.where(is_better & np.isinf(first), night, first)
        if not np.isinf(first).any():
            break
    return first


def first_better_by_records(nights, channels, most, seed):
    """The same, were each record a bet of its own."""
    rng = np.random.default_rng(seed)
    bets = np.geomspace(0.05, 0.9, 8)
    first = np.full(channels, np.inf)
    for channel in range(channels):
        topics = nights.topic * rng.standard_normal((most, 1))
        gains = np.clip(nights.gain + topics + SD * rng.standard_normal((most, nights.records)), -1, 1)
        logs = np.stack([np.log1p(bet * gains).sum(axis=1).cumsum() for bet in bets], axis=1)
        reached = np.flatnonzero(np.exp(np.minimum(logs, 100)).mean(axis=1) >= 1 / LEVEL)
        first[channel] = reached[0] + 1 if len(reached) else np.inf
    return first


def _share(first, nights):
    return f"{100 * (first <= nights).mean():.2f} %"


def rows_of_equal(channels, seed):
    """How often one that is no better is taken for better."""
    found = [(each, first_better(each, channels, YEAR, [seed, place])) for place, each in enumerate(EQUAL)]
    rows = [[each.name, f"{each.records:,}", _share(first, FORTNIGHT), _share(first, YEAR)] for each, first in found]
    by_records = first_better_by_records(EQUAL[1], min(channels, OF_EACH_RECORD), FORTNIGHT, [seed, len(EQUAL)])
    name = f"{EQUAL[1].name}, were each record a bet of its own"
    return [*rows, [name, f"{EQUAL[1].records:,}", _share(by_records, FORTNIGHT), ""]]


def rows_of_gains(channels, seed):
    """How many nights it takes to see a gain."""
    rows = []
    for place, each in enumerate(GAINS):
        first = first_better(each, max(100, channels // 10), MOST, [seed, 100 + place])
        half, most = np.quantile(first, [0.5, 0.9], method="higher")
        rows.append([f"{each.gain}", f"{each.topic or 'none'}", f"{each.records:,}", f"{half:.0f}", f"{most:.0f}"])
    return rows


def section(equal, gains, options, seconds):
    """What goes into RESULTS.md."""
    return f"""## Nights of new records

Simulated, seed {options.seed}: one challenger beside one champion, {SD} nat a record beside what a night's records
share (standard deviation {TOPIC} nat where there is a topic), taken for better at 1 / level = {1 / LEVEL:.0f}, so with
a chance of {100 * LEVEL:.2f} % at most if it is not. {", ".join(versions(["numpy"]))}; {seconds:.0f} seconds.

    python -m bench.fresh_nights --channels {options.channels} --seed {options.seed}

Equal in the long run, {options.channels:,} channels a row ({OF_EACH_RECORD} in the last); taken for better:

{table(["nights", "records a night", "within 14 nights", "within a year"], equal)}

In the first two rows the evidence's assumptions hold, and all but hold in the fifth, where losses lie at the bound. In
the third and fourth a night can be foreseen from the one before. In the sixth the rare loss is far beyond the bound,
and may not have come yet.

Truly better, {max(100, options.channels // 10):,} channels a row; nights until it is taken for better:

{table(["gain, nats", "topic, nats", "records a night", "half of them", "nine of ten"], gains)}
"""


def main(argv=None):
    """Simulate, and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    begun = perf_counter()
    equal, gains = rows_of_equal(options.channels, options.seed), rows_of_gains(options.channels, options.seed)
    found = section(equal, gains, options, perf_counter() - begun)
    print(found)
    write_section(options.results, "fresh-nights", found)


if __name__ == "__main__":
    main()
