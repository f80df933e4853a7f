"""Years of nightly promotions, simulated: how often a model that is no better replaces the one in use.

    python -m bench.nightly_years [--years 2000] [--nights 365] [--seed 0] [--workers 2] [--results bench/RESULTS.md]

Every night a challenger meets the champion on one frozen set and is decided on by the product's own functions
(`job.core.nightly`, `job.core.judging.paired`). Years run beside each other as rows of arrays; only the nights whose t
is anywhere near the night's level go through the bootstrap, all others are far from a promotion.

A model's loss a token on an example is a common part, which pairs cancel, its own true mean, and a deviation of its
own: Student's t with four degrees of freedom, a tenth of its variance shared by the example's cluster, scaled so that
the difference of two models has a standard deviation of 0.3 nat. The frozen set has 500 examples in 100 clusters and
five guarded slices, with answers of unequal length; there are a regression set of 500 and 200 new records a night.
New records are independent of each other, but for worlds with topics of the day or with customers who come back.
"""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from time import perf_counter

import numpy as np

from bench.results import RESULTS, table, versions, write_section
from job.core.judging.paired import gap_of, gaps_of, pairs_of
from job.core.nightly.error_budget import open_budget, spend
from job.core.nightly.fresh_evidence import (
    BETS,
    SIGN_ERRORS,
    WAITING,
    FreshEvidence,
    errors_of,
    log_growth,
    night_share,
)
from job.core.nightly.gate import GUARD_LEVEL, Evidence, decide, shares_of

SD = 0.3
"""Nats a token, of the difference of two models on an example."""
OF_ONE = SD / math.sqrt(2)
"""Of one model's own deviation."""
CLUSTERS, IN_CLUSTER, SHARED = 100, 5, 0.1
EXAMPLES = CLUSTERS * IN_CLUSTER
SLICES = 5
REGRESSION = 500
NEW_RECORDS = 200
CUSTOMERS = 20
"""Of a night, each with as many of its new records; one's records share a tenth of a model's variance."""
DRIFT_NIGHTS = 30
FIRST_DAY = 740_000
AT_ONCE = 125
"""Years in one array."""
_TOKENS = np.exp(np.random.default_rng(7).normal(4, 0.4, EXAMPLES)).round()
"""Target tokens of the frozen examples; the lengths of new records are drawn from them."""
_CLUSTER = np.repeat(np.arange(CLUSTERS), IN_CLUSTER)
_SLICES = {f"s{n}": np.arange(EXAMPLES) % SLICES == n for n in range(SLICES)}
_NEAR = 0.5
"""Standard errors from the night's level within which a night is looked at by the bootstrap."""
_FIRST_LOOK, _FAR = 4000, 3
"""Resamples of a first look, and how many times the level its p-value has to be so that no second one is taken."""


@dataclass(frozen=True, kw_only=True)
class World:
    """How the models of a channel's nights differ."""

    name: str
    step: float = 0.0
    """True loss of each night's challenger less that of the model in use, in nats a token."""
    spread: float = 0.0
    """Standard deviation of challengers' true losses around the first model's."""
    wander: float = 0.0
    """The same around the model in use, so that losses may add up."""
    topic: float = 0.0
    """Standard deviation of what a night's topic moves all its new records by, one model against another."""
    returning: float | None = None
    """Share of a night's customers who come back the next night; None: each record stands for itself."""
    anew: bool = False
    """Whether the champion's deviations are drawn anew each night; otherwise they stay, as on a real frozen set."""
    gain: float | None = None
    """A true gain of all challengers in the last seven nights; None: there is none."""
    flattered: float = 0.0
    """By how much challengers look better on the frozen examples than they are: on those alone."""
    nights: int | None = None
    """None: as many as asked for."""
    years: int | None = None
    """At most; None: as many as asked for."""
    gate: bool = True
    """False: a plain paired t-test at 5 % each night, for comparison."""


WORLDS = (
    World(name="equal models, one frozen set"),
    World(name="equal models", anew=True, years=500),
    World(name="a true gain of 0.05 after 100 nights, one frozen set", gain=0.05, nights=107, years=500),
    World(name="a true gain of 0.05 after 100 nights", anew=True, gain=0.05, nights=107, years=500),
    World(name="equal models, a t-test at 5 % each night", anew=True, gate=False, years=200),
    World(name="equal models, topics of the day, one frozen set", topic=0.02, years=500),
    World(name="equal models, half of the customers come back, one frozen set", returning=0.5, years=500),
    World(name="each differs by 0.01 from the model in use, one frozen set", wander=0.01, years=1000),
    World(name="each 0.005 worse than the model in use", step=0.005, anew=True, years=1000),
    World(name="each 0.01 worse than the model in use", step=0.01, anew=True, years=300),
    World(name="retrained: true losses differ by 0.005, one frozen set", spread=0.005, years=300),
    World(name="each 0.005 worse, but 0.05 better on the frozen set", step=0.005, flattered=0.05, nights=40, years=20),
)
"""The first ones matter most: the table is written after each."""


@dataclass(kw_only=True)
class Model:
    """A model that was judged; what is judged of few models is drawn when it is."""

    name: str
    true: float
    frozen: np.ndarray
    """Its deviations on the frozen examples, a token: [N]."""
    rng: np.random.Generator = field(repr=False)

    @cached_property
    def regression(self):
        """The same on the regression set, without clusters."""
        return self.true + heavy(self.rng, REGRESSION)


@dataclass(frozen=True, kw_only=True)
class Years:
    """What came of some years."""

    years: int
    wrong: np.ndarray
    """Wrong promotions of each year: [Y]."""
    right: np.ndarray
    """Promotions of a model that is truly better."""
    drift: np.ndarray
    """The highest true loss of a model in use, less that of the first: [Y]."""
    gained: np.ndarray
    """Whether the true gain was in use by the end."""
    by_fresh: int
    """Promotions by fresh records."""
    paid: np.ndarray
    """What the error budget gave, all nights together: [Y]."""


def heavy(rng, shape):
    """Student's t with four degrees of freedom and the standard deviation of one model."""
    # As standard_t would draw it, but in fp32: half of chi-squared with four degrees of freedom is two exponentials.
    halves = rng.standard_exponential(shape, np.float32) + rng.standard_exponential(shape, np.float32)
    return rng.standard_normal(shape, np.float32) * np.sqrt(OF_ONE**2 / halves)


def deviations(rng, years):
    """Of a model on the frozen examples, for each year: [Y, N]."""
    own, shared = heavy(rng, (years, EXAMPLES)), rng.standard_normal((years, CLUSTERS), np.float32) * OF_ONE
    return math.sqrt(1 - SHARED) * own + math.sqrt(SHARED) * np.repeat(shared, IN_CLUSTER, axis=1)


def t_of(difference):
    """The gap in standard errors, as `paired` has it, for each year: [Y, N] -> [Y]."""
    summed = (difference * _TOKENS).reshape(-1, CLUSTERS, IN_CLUSTER).sum(axis=2)
    weight = _TOKENS.reshape(CLUSTERS, IN_CLUSTER).sum(axis=1)
    gap = summed.sum(axis=1) / weight.sum()
    residual = summed - gap[:, None] * weight
    error = np.sqrt((residual**2).sum(axis=1) * CLUSTERS / (CLUSTERS - 1)) / weight.sum()
    return gap / error


class Channels:
    """Many channels, a year each, side by side."""

    def __init__(self, world, years, seed):
        self.world, self.years = world, years
        self.rng = np.random.Generator(np.random.PCG64(seed))
        first = deviations(self.rng, years)
        self.true = np.zeros(years)
        """Of the models in use: [Y]."""
        self.frozen = first
        self.champions = [[(0, self._model("first", 0.0, row))] for row in first]
        """Of each channel: from which night on which model was in use."""
        self.base = [self._model("base", 0.0, row) for row in deviations(self.rng, years)]
        self.wrong, self.right, self.drift = np.zeros(years, int), np.zeros(years, int), np.zeros(years)
        self.by_fresh = 0
        self.budgets, self.paid = [open_budget(FIRST_DAY)] * years, np.zeros(years)
        self.customers = self._new_customers(years, WAITING + 1)
        """How far a night's customers move the model in use, and those that wait: [Y, 1 + W, customers]."""
        self._no_one_waits(np.ones(years, bool))

    def _model(self, name, true, frozen):
        return Model(name=name, true=true, frozen=frozen, rng=self.rng)

    def _new_customers(self, *shape):
        return self.rng.standard_normal((*shape, CUSTOMERS), np.float32) * OF_ONE

    def _no_one_waits(self, rows):
        if not hasattr(self, "capitals"):
            shape = (self.years, WAITING)
            self.capitals = np.zeros((*shape, 2, len(BETS)))
            self.waiting_true, self.waiting_level = np.zeros(shape), np.zeros(shape)
            self.waiting_frozen = np.zeros((*shape, EXAMPLES), np.float32)
            self.waiting_records = np.zeros(shape, int)
            self.largest, self.last = np.zeros(shape), np.full(shape, np.nan)
        self.waiting_level[rows], self.last[rows] = 0.0, np.nan
        self.capitals[rows] = -np.inf

    def night(self, night, *, true):
        """One night in each channel: fresh records first, then tonight's challengers, whose true losses these are."""
        self._test_before_training(night)
        challenger = deviations(self.rng, self.years)
        champion = deviations(self.rng, self.years) if self.world.anew else self.frozen
        t = t_of(challenger - champion + (true - self.true - self.world.flattered)[:, None])
        if not self.world.gate:
            self._promote_by_t_test(night, t, challenger, true)
            return
        promoted = np.zeros(self.years, bool)
        on_frozen, on_fresh = shares_of(self._pay(night))
        borders = np.array([NormalDist().inv_cdf(level) for level in on_frozen]) + _NEAR
        for row in np.flatnonzero(t <= borders):
            model = self._model(f"night-{night}", true[row], challenger[row])
            promoted[row] = self._judge(night, row, model, champion[row], level=on_frozen[row])
        self._wait(~promoted, challenger, true, on_fresh)

    def _pay(self, night):
        """What the error budgets give tonight: [Y]."""
        levels = np.zeros(self.years)
        speaks = (self.last <= -SIGN_ERRORS).any(axis=1)
        for row, budget in enumerate(self.budgets):
            saves = night > 0 and not speaks[row]
            self.budgets[row], levels[row] = spend(
                budget, f"night-{night}", FIRST_DAY + night, per_year=1.0, saves=saves
            )
        self.paid += levels
        return levels

    def _promote_by_t_test(self, night, t, challenger, true):
        for row in np.flatnonzero(t <= NormalDist().inv_cdf(0.05)):
            self._promote(night, row, self._model(f"night-{night}", true[row], challenger[row]))

    def _test_before_training(self, night):
        """The night's new records, for all that wait, in one array."""
        if not self.world.gate:
            return
        tokens = self.rng.choice(_TOKENS, (self.years, 1, NEW_RECORDS))
        found = self._on_new_records()
        found[:, 0] += self.true[:, None]
        found[:, 1:] += self.waiting_true[:, :, None]
        difference = (found[:, 1:] - found[:, :1]) * tokens
        self.last = np.where(self.waiting_level > 0, errors_of(difference, tokens), np.nan)
        gain = night_share(tokens) * -difference.sum(axis=2) / tokens.sum(axis=2)
        self.capitals[:, :, 0] += log_growth(gain, self.largest)
        self.capitals[:, :, 1] += log_growth(-gain, self.largest)
        self.largest = np.maximum(self.largest, abs(gain))
        self.waiting_records += NEW_RECORDS
        with np.errstate(divide="ignore"):
            enough = 1 / self.waiting_level
        better = np.exp(self.capitals[:, :, 0]).mean(axis=2) >= enough
        for row in np.flatnonzero(better.any(axis=1)):
            slot = int(np.argmax(better[row]))
            model = self._model("waiting", self.waiting_true[row, slot], self.waiting_frozen[row, slot])
            self._judge(night, row, model, self.frozen[row], level=0.0, fresh=self._evidence(row, slot))

    def _on_new_records(self):
        """Deviations a token of the model in use and of those that wait: [Y, 1 + W, records]."""
        world, shape = self.world, (self.years, WAITING + 1)
        found = heavy(self.rng, (*shape, NEW_RECORDS))
        if world.topic:
            found += self.rng.standard_normal((*shape, 1), np.float32) * world.topic / math.sqrt(2)
        if world.returning is not None:
            come_back = self.rng.random((self.years, 1, CUSTOMERS)) < world.returning
            self.customers = np.where(come_back, self.customers, self._new_customers(*shape))
            own = np.repeat(self.customers, NEW_RECORDS // CUSTOMERS, axis=2)
            found = math.sqrt(1 - SHARED) * found + math.sqrt(SHARED) * own
        return found

    def _evidence(self, row, slot):
        better, worse = (tuple(map(float, logs)) for logs in self.capitals[row, slot])
        return FreshEvidence(
            challenger="waiting",
            champion="champion",
            level=float(self.waiting_level[row, slot]),
            records=int(self.waiting_records[row, slot]),
            nights=("some",),
            largest=float(self.largest[row, slot]),
            better=better,
            worse=worse,
        )

    def _judge(self, night, row, model, champion_s, *, level, fresh=None):
        """Whether the product promotes this model here, tonight; and if so, it is in use."""
        champion = self._in_use(row, night)
        differences = model.frozen + model.true - self.world.flattered - champion_s - champion.true
        pairs = pairs_of(differences * _TOKENS, np.zeros(EXAMPLES), _TOKENS, _CLUSTER)
        seed = night * self.years + row
        if fresh is None and gap_of(pairs, seed=seed, resamples=_FIRST_LOOK).p_better > _FAR * level:
            return False
        gap = gap_of(pairs, seed=seed)
        if fresh is None and gap.p_better > level:
            return False
        earlier = self._looked_back_to(row, night - DRIFT_NIGHTS)
        decision = decide(
            Evidence(
                challenger=model.name if fresh is None else fresh.challenger,
                champion="champion",
                level=level,
                gap=gap,
                slices=gaps_of(pairs, _SLICES, GUARD_LEVEL / SLICES, seed=seed),
                regression=self._on_regression_set(model, champion),
                drift={
                    "the champion of 30 days ago": self._on_regression_set(model, earlier),
                    "the base": self._on_regression_set(model, self.base[row]),
                },
                fresh=fresh,
            )
        )
        if decision.promoted:
            self.by_fresh += fresh is not None
            self._promote(night, row, model)
        return decision.promoted

    @staticmethod
    def _on_regression_set(model, other):
        return gap_of(pairs_of(model.regression, other.regression, np.ones(REGRESSION)), resamples=1000)

    def _in_use(self, row, night):
        return [model for since, model in self.champions[row] if since <= night][-1]

    def _looked_back_to(self, row, night):
        """What was in use that night; before the channel began, the first that was promoted, if any was."""
        if night >= 0:
            return self._in_use(row, night)
        return self.champions[row][:2][-1][1]

    def _promote(self, night, row, model):
        is_wrong = model.true >= self.true[row]
        self.wrong[row] += is_wrong
        self.right[row] += not is_wrong
        self.champions[row].append((night, model))
        self.true[row], self.frozen[row] = model.true, model.frozen
        self.drift[row] = max(self.drift[row], model.true)
        self.customers[row] = self._new_customers(WAITING + 1)
        self._no_one_waits(row)

    def _wait(self, rows, challenger, true, level):
        """Tonight's challengers take the place of those with the least evidence, as `worth_keeping` says."""
        evidence = np.exp(self.capitals[:, :, 0]).mean(axis=2)
        rows = np.flatnonzero(rows)
        slot = np.argmin(evidence, axis=1)[rows]
        self.capitals[rows, slot] = 0.0
        self.waiting_true[rows, slot], self.waiting_level[rows, slot] = true[rows], level[rows]
        self.waiting_frozen[rows, slot], self.waiting_records[rows, slot] = challenger[rows], 0
        self.last[rows, slot] = np.nan
        self.largest[rows, slot], self.customers[rows, 1 + slot] = 0.0, self._new_customers(len(rows))


def live(world, years, nights, seed):
    """Some years of a world."""
    channels = Channels(world, years, seed)
    for night in range(nights):
        true = channels.true + world.step
        if world.spread:
            true = channels.rng.normal(0, world.spread, years)
        if world.wander:
            true = channels.rng.normal(channels.true, world.wander)
        if world.gain is not None:
            true = np.full(years, -world.gain if night >= nights - 7 else 0.0)
        channels.night(night, true=true)
    gained = channels.true < 0 if world.gain is not None else np.zeros(years, bool)
    return Years(
        years=years,
        wrong=channels.wrong,
        right=channels.right,
        drift=channels.drift,
        gained=gained,
        by_fresh=channels.by_fresh,
        paid=channels.paid,
    )


def together(parts):
    """Several lots of years as one."""
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("wrong", "right", "drift", "gained", "paid")
    }
    return Years(years=sum(p.years for p in parts), by_fresh=sum(p.by_fresh for p in parts), **joined)


def row_of(world, found, nights):
    """A line of the table."""
    error = 1.96 * found.wrong.std(ddof=1) / math.sqrt(found.years)
    return [
        world.name,
        f"{found.years:,} x {nights}",
        f"{found.wrong.mean():.2f} ± {error:.2f}",
        f"{100 * (found.wrong > 2).mean():.1f} %",
        f"{found.drift.max():.3f}",
        "" if world.gain is None else f"{100 * found.gained.mean():.1f} %",
        f"{found.by_fresh / found.years:.2f}",
        f"{found.paid.mean():.2f}" if world.gate else "",
    ]


def lots_of(world, place, options):
    """Years, nights and seed of each part of a world."""
    years, nights = min(options.years, world.years or options.years), world.nights or options.nights
    for lot, first in enumerate(range(0, years, AT_ONCE)):
        yield min(AT_ONCE, years - first), nights, [options.seed, place, lot]


def main(argv=None, worlds=WORLDS):
    """Simulate all worlds and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--years", type=int, default=2000)
    parser.add_argument("--nights", type=int, default=365)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    begun = perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        begun_worlds = [
            [pool.submit(live, world, *lot) for lot in lots_of(world, place, options)]
            for place, world in enumerate(worlds)
        ]
        rows = []
        for world, lots in zip(worlds, begun_worlds, strict=True):
            rows.append(row_of(world, together([lot.result() for lot in lots]), world.nights or options.nights))
            print(*rows[-1], sep=" | ", flush=True)
            write_section(options.results, "nightly-years", section(rows, options, perf_counter() - begun))


def section(rows, options, seconds):
    """What goes into RESULTS.md."""
    header = [
        "each night's challenger",
        "years x nights",
        "wrong promotions",
        "more than 2 of them",
        "most drift, nats",
        "gain in use",
        "promoted by fresh records",
        "levels paid",
    ]
    return f"""## Years of nightly promotions

Simulated, seed {options.seed}. Paired differences of standard deviation {SD} nat with heavy tails (Student's t, 4
degrees of freedom), {EXAMPLES} frozen examples in {CLUSTERS} clusters, {SLICES} guarded slices, a regression set of
{REGRESSION}, {NEW_RECORDS} new records a night, {WAITING} challengers that wait for them, an error budget of one wrong
promotion in 365 nights. Counts are means over the years (or nights) of a row, with their 95 % interval. A promotion is
wrong where the new model is truly no better than the one in use. Drift: the highest true loss of a model in use, less
that of the first; the most of it that came up in the simulated years of a row, which is no bound of what may. Where all
models are equal there is none to come up. Gain in use: share of the channels that had the better model in use after
seven nights of it.

**One frozen set** is what a channel has: the deviations of the model in use on the frozen examples stay. In the other
rows they are drawn anew each night, as if each night were judged on new examples. *Topics of the day* move all new
records of a night together, by a standard deviation of 0.02 nat between two models. *Half of the customers come back*:
a night's new records are those of {CUSTOMERS} customers, half of whom were there the night before, and move the same
model in the same way; so that tonight's difference can be foreseen in part, which the evidence of new records does not
allow for. Levels paid: what the error budget gave a year's tests, which is the most that may be expected to be wrong.
{", ".join(versions(["numpy"]))}; {seconds / 60:.0f} minutes in {options.workers}
processes.

    python -m bench.nightly_years --years {options.years} --nights {options.nights} --seed {options.seed}

{table(header, rows)}
"""


if __name__ == "__main__":
    main()
