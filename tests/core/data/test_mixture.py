"""Several sources in one run: exact shares at every moment, each in an order of its own."""

from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from job.core.data.mixture import Mixture, Portion, mixture_of
from job.core.plan.course import plan_course

steady = settings(deadline=None, derandomize=True, database=None)
weights = st.lists(st.integers(1, 60), min_size=2, max_size=12)
portions = st.lists(
    st.builds(Portion, examples=st.integers(1, 40), epochs=st.sampled_from([0.1, 0.5, 1.0, 1.1, 2.0, 7.0])),
    min_size=2,
    max_size=6,
)
seeds = st.integers(0, 2**63 - 1)


def mixed(*weights):
    return mixture_of([Portion(examples=5, weight=weight) for weight in weights])


def by_source(course, batch):
    """How many examples of a batch come from each source."""
    ends = [*accumulate(course.mixture.sizes)]
    return np.bincount(np.searchsorted(ends, batch, side="right"), minlength=len(ends)).tolist()


@steady
@given(weights, st.integers(0, 3000))
@example([1] * 12, 11)
@example([60, 60, *[1] * 10], 0)
def test_the_shares_of_every_prefix_are_exact_to_less_than_one_example(weights, start):
    """However many sources: taking the one with the largest arrears leaves some of these behind by 1.23."""
    mixture = mixed(*map(float, weights))
    counts = [*mixture.drawn(start)]
    for n, (source, number) in enumerate(mixture.draws(start, start + 300), start=start + 1):
        assert number == counts[source]
        counts[source] += 1
        assert all(
            abs(count - Fraction(n * weight, sum(weights))) < 1 for count, weight in zip(counts, weights, strict=True)
        )


@steady
@given(weights, st.integers(0, 20_000), st.integers(0, 40))
def test_a_draw_depends_on_its_number_alone(weights, first, many):
    """Also beyond what was asked before, and in a mixture that nobody asked before."""
    mixture = Mixture(sizes=(9,) * len(weights), weights=tuple(weights))
    straight = [*mixture.draws(0, first + many)]

    assert [*mixture.draws(first, first + many)] == straight[first:]
    assert [*mixture.draws(0, first)] == straight[:first]
    drawn = np.bincount([source for source, _ in straight[:first]], minlength=len(weights))
    assert mixture.drawn(first) == tuple(drawn)


def test_three_to_one_over_200_steps_is_exact_in_every_batch():
    course = plan_course(
        examples=[Portion(examples=70, weight=3), Portion(examples=1000, weight=1)],
        batch_size=8,
        steps=200,
        epochs=None,
        seed=4,
    )

    assert [by_source(course, course.batch(step)) for step in range(1, 201)] == [[6, 2]] * 200


def test_three_to_one_in_batches_that_it_does_not_divide_is_exact_at_every_border():
    course = plan_course(
        examples=[Portion(examples=7, weight=0.75), Portion(examples=9, weight=0.25)],
        batch_size=5,
        steps=200,
        epochs=None,
        seed=4,
    )
    drawn = np.cumsum([by_source(course, course.batch(step)) for step in range(1, 201)], axis=0)

    assert (np.abs(drawn - np.outer(np.arange(1, 201) * 5, [0.75, 0.25])) < 1).all()
    assert drawn[-1].tolist() == [750, 250]


@steady
@given(portions, st.sampled_from([0.1, 1.0, 1.1, 3.0]), st.integers(1, 50), seeds)
def test_without_weights_each_source_has_its_own_epochs_exactly(portions, epochs, batch_size, seed):
    course = plan_course(examples=portions, batch_size=batch_size, steps=None, epochs=epochs, seed=seed)
    drawn = np.array([e for step in range(1, course.steps + 1) for e in course.batch(step)])
    starts = [0, *accumulate(course.mixture.sizes)]

    for source, portion in enumerate(portions):
        mine = drawn[(drawn >= starts[source]) & (drawn < starts[source + 1])] - starts[source]
        tenths = round(portion.epochs * 10) * round(epochs * 10)
        assert len(mine) == -(-portion.examples * tenths // 100)
        for first in range(0, len(mine), portion.examples):
            epoch = mine[first : first + portion.examples].tolist()
            assert len(set(epoch)) == len(epoch)


@steady
@given(st.lists(st.integers(1, 30), min_size=2, max_size=5), st.data(), seeds)
def test_every_epoch_of_every_source_is_a_permutation(sizes, data, seed):
    shares = data.draw(st.lists(st.floats(0.01, 100), min_size=len(sizes), max_size=len(sizes)))
    given = [Portion(examples=n, weight=w) for n, w in zip(sizes, shares, strict=True)]
    course = plan_course(examples=given, batch_size=7, steps=40, epochs=None, seed=seed)
    drawn = [e for step in range(1, 41) for e in course.batch(step)]

    assert len(drawn) == course.total == 280
    for start, size in zip([0, *accumulate(sizes)], sizes, strict=False):
        mine = [e for e in drawn if start <= e < start + size]
        for first in range(0, len(mine), size):
            epoch = mine[first : first + size]
            assert len(set(epoch)) == len(epoch)


@steady
@given(st.integers(1, 60), st.integers(1, 80), st.integers(1, 30), seeds, st.sampled_from([None, 1.0, 0.3]))
def test_one_source_has_the_course_of_a_run_without_others(examples, batch_size, steps, seed, weight):
    alone = plan_course(examples=examples, batch_size=batch_size, steps=steps, epochs=None, seed=seed)
    listed = plan_course(
        examples=[Portion(examples=examples, weight=weight)],
        batch_size=batch_size,
        steps=steps,
        epochs=None,
        seed=seed,
    )

    assert [alone.batch(step) for step in range(1, steps + 1)] == [listed.batch(step) for step in range(1, steps + 1)]


def test_with_weights_an_epoch_is_as_many_examples_as_there_are():
    sources = [Portion(examples=90, weight=1), Portion(examples=10, weight=1)]
    course = plan_course(examples=sources, batch_size=10, steps=None, epochs=2, seed=0)

    assert (course.total, course.steps, course.epochs) == (200, 20, 2)
    assert course.mixture.drawn(course.total) == (100, 100)
    assert (course.passes(0), course.passes(1)) == (pytest.approx(100 / 90), 10)


def test_without_weights_or_epochs_steps_are_shared_by_size():
    sources = [Portion(examples=30), Portion(examples=10)]
    course = plan_course(examples=sources, batch_size=4, steps=10, epochs=None, seed=0)

    assert [by_source(course, course.batch(step)) for step in range(1, 11)] == [[3, 1]] * 10


def test_sources_of_one_size_have_orders_of_their_own():
    course = plan_course(examples=[Portion(examples=50)] * 2, batch_size=100, steps=1, epochs=None, seed=0)
    batch = course.batch(1)

    assert [e for e in batch if e < 50] != [e - 50 for e in batch if e >= 50]


def test_the_order_of_a_mixture_never_changes_silently():
    """A run that is resumed by a newer image must go on with the examples it would have had."""
    sources = [Portion(examples=3, weight=2), Portion(examples=4, weight=1), Portion(examples=2, weight=0.5)]
    course = plan_course(examples=sources, batch_size=4, steps=4, epochs=None, seed=7)

    assert [course.batch(step) for step in range(1, 5)] == [[2, 0, 4, 1], [5, 0, 8, 1], [2, 6, 1, 3], [0, 7, 2, 2]]


def test_a_far_away_batch_of_many_examples_is_found_at_once():
    """Shares that repeat are not walked through."""
    course = plan_course(
        examples=[Portion(examples=1000, weight=3), Portion(examples=1000, weight=1)],
        batch_size=16,
        steps=10**15,
        epochs=None,
        seed=3,
    )

    assert by_source(course, course.batch(10**15)) == [12, 4]


def test_the_mean_length_is_that_of_what_is_drawn():
    sources = [Portion(examples=1, weight=1), Portion(examples=3, weight=3)]
    course = plan_course(examples=sources, batch_size=4, steps=1, epochs=None, seed=0)

    assert course.mean_length(np.array([100, 10, 20, 30], dtype=np.int32)) == pytest.approx(0.25 * 100 + 0.75 * 20)
