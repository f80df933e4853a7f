"""What is decided before the device is touched: lengths, order, packing."""

import hashlib
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from job.core.data.lengths import choose_max_length, length_statistics
from job.core.data.mixture import Portion
from job.core.data.packing import grain_of, pack, pack_evenly
from job.core.errors import DataError, UsageError
from job.core.plan.course import plan_course

steady = settings(deadline=None, derandomize=True, database=None)
many_lengths = st.lists(st.integers(1, 5000), min_size=1, max_size=200).map(lambda v: np.array(v, dtype=np.int32))


def lengths(*values):
    return np.array(values, dtype=np.int32)


# --- the longest example ---------------------------------------------------------------------------------------------


def test_auto_covers_the_longest_example_rounded_up_to_32():
    chosen = choose_max_length(lengths(100, 300, 310), wanted="auto", positions=4096)

    assert chosen.tokens == 320
    assert chosen.reason == "covers the longest example (310 tokens); no example is longer"


def test_auto_leaves_a_few_outliers_out_and_says_what_is_lost():
    chosen = choose_max_length(lengths(*[100] * 999, 4000), wanted="auto", positions=4096)

    assert chosen.tokens == 224  # twice 100, rounded up to a multiple of 32
    assert "a few outliers reach 4000" in chosen.reason
    assert "1 of 1000 examples are longer (3,776 of 103,900 tokens, 3.63%, lie beyond it)" in chosen.reason


def test_auto_covers_a_long_tail_that_is_no_outlier():
    assert choose_max_length(lengths(*[100] * 99, 190), wanted="auto", positions=4096).tokens == 192


def test_auto_stops_at_the_models_positions_and_says_so():
    chosen = choose_max_length(lengths(5000, 5000), wanted="auto", positions=2048)

    assert chosen.tokens == 2048
    assert "2048 positions" in chosen.reason
    assert "2 of 2 examples are longer" in chosen.reason


def test_positions_that_are_no_multiple_of_32_are_used_whole():
    assert choose_max_length(lengths(1000), wanted="auto", positions=1000).tokens == 1000


def test_a_number_in_the_recipe_is_taken_as_it_is():
    chosen = choose_max_length(lengths(100, 600), wanted=512, positions=4096)

    assert chosen.tokens == 512
    assert chosen.reason == "set in the recipe; 1 of 2 examples are longer (88 of 700 tokens, 12.57%, lie beyond it)"


def test_a_number_beyond_the_models_positions_is_refused():
    assert choose_max_length(lengths(100), wanted=4096, positions=4096).tokens == 4096
    with pytest.raises(UsageError, match=r"data\.max_length is 4097, but the base model has 4096 positions"):
        choose_max_length(lengths(100), wanted=4097, positions=4096)


def test_no_example_at_all_is_wrong_data():
    for wanted in ("auto", 512):
        with pytest.raises(DataError, match="no example is left"):
            choose_max_length(lengths(), wanted=wanted, positions=4096)


@steady
@given(many_lengths, st.integers(8, 6000))
def test_auto_is_never_beyond_the_positions_and_cuts_only_when_it_must(values, positions):
    tokens = choose_max_length(values, wanted="auto", positions=positions).tokens

    assert 1 <= tokens <= positions
    if tokens < min(positions, values.max()):
        assert values.max() > 2 * np.percentile(values, 99)
        assert (values <= tokens).mean() >= 0.98


# --- statistics ------------------------------------------------------------------------------------------------------


@steady
@given(many_lengths, st.integers(1, 40))
def test_a_histogram_holds_every_example_once(values, bins):
    found = length_statistics(values, bins=bins)
    edges, counts = found.edges, found.counts

    assert sum(counts) == len(values)
    assert len(edges) == len(counts) + 1 <= bins + 1
    assert {b - a for a, b in pairwise(edges)} == {edges[1] - edges[0]}
    assert edges[0] == values.min()
    assert edges[-1] > values.max()
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        assert count == ((values >= low) & (values < high)).sum()


@steady
@given(many_lengths)
def test_percentiles_are_lengths_that_occur_and_that_so_many_do_not_exceed(values):
    for name, length in length_statistics(values).percentiles.items():
        share = int(name.removeprefix("p")) / 100
        assert length in values
        assert (values <= length).mean() >= share
        assert (values < length).mean() <= share


# --- which examples make a step --------------------------------------------------------------------------------------

courses = st.builds(
    plan_course,
    examples=st.integers(1, 60),
    batch_size=st.integers(1, 80),
    steps=st.integers(1, 40),
    epochs=st.none(),
    seed=st.integers(0, 2**63 - 1),
)
courses_by_epochs = st.builds(
    plan_course,
    examples=st.integers(1, 60),
    batch_size=st.integers(1, 80),
    steps=st.none(),
    epochs=st.sampled_from([0.1, 0.5, 1.0, 1.1, 2.0, 3.0]),
    seed=st.integers(0, 2**63 - 1),
)


def drawn(course):
    return [example for step in range(1, course.steps + 1) for example in course.batch(step)]


@steady
@given(st.one_of(courses, courses_by_epochs))
def test_every_epoch_is_a_permutation_of_all_examples(course):
    order = drawn(course)

    assert len(order) == course.total
    for first in range(0, len(order), course.examples):
        epoch = order[first : first + course.examples]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(course.examples))


@steady
@given(courses)
def test_a_run_by_steps_has_only_whole_batches(course):
    assert {len(course.batch(step)) for step in range(1, course.steps + 1)} == {course.batch_size}
    assert course.epochs == course.steps * course.batch_size / course.examples


@steady
@given(courses_by_epochs)
def test_in_a_run_by_epochs_only_the_last_batch_may_be_smaller(course):
    sizes = [len(course.batch(step)) for step in range(1, course.steps + 1)]

    assert set(sizes[:-1]) <= {course.batch_size}
    assert 1 <= sizes[-1] <= course.batch_size


@steady
@given(st.integers(1, 3000), st.integers(1, 30))
@example(100, 11)
def test_tenths_of_an_epoch_are_counted_as_written(examples, tenths):
    """In binary, 1.1 epochs of 100 examples are a bit more than 110, which would be one step too many."""
    course = plan_course(examples=examples, batch_size=1, steps=None, epochs=tenths / 10, seed=0)

    assert course.total == -(-examples * tenths // 10)


@steady
@given(courses, st.data())
def test_a_batch_depends_on_its_step_alone(course, data):
    """Resuming at a step gives what going there gives."""
    straight = {step: course.batch(step) for step in range(1, course.steps + 1)}
    for step in data.draw(st.permutations(sorted(straight))):
        assert course.batch(step) == straight[step]


def test_a_far_away_batch_is_found_without_walking_there():
    course = plan_course(examples=1000, batch_size=16, steps=10**15, epochs=None, seed=3)

    assert len(set(course.batch(10**15))) == 16


def test_more_steps_do_not_change_the_first_ones():
    short, long = (plan_course(examples=50, batch_size=8, steps=s, epochs=None, seed=5) for s in (10, 100))

    assert drawn(short) == drawn(long)[:80]


def test_epochs_and_seeds_differ_in_their_order():
    course = plan_course(examples=50, batch_size=50, steps=2, epochs=None, seed=5)
    other = plan_course(examples=50, batch_size=50, steps=2, epochs=None, seed=6)

    assert course.batch(1) != course.batch(2)
    assert course.batch(1) != other.batch(1)
    assert course.batch(1) != list(range(50))


def test_every_place_is_equally_likely():
    """Over many seeds, each example comes first about as often."""
    firsts = [plan_course(examples=8, batch_size=1, steps=1, epochs=None, seed=s).batch(1)[0] for s in range(1600)]

    assert all(150 <= count <= 250 for count in np.bincount(firsts, minlength=8))


def test_the_order_never_changes_silently():
    """A run that is resumed by a newer image must go on with the examples it would have had."""
    small = plan_course(examples=10, batch_size=4, steps=6, epochs=None, seed=0)
    large = plan_course(examples=100_000, batch_size=64, steps=4000, epochs=None, seed=2**63 - 1)

    assert [small.batch(step) for step in range(1, 7)] == [
        [8, 5, 9, 2],
        [3, 7, 0, 6],
        [1, 4, 9, 1],
        [0, 3, 5, 8],
        [4, 7, 2, 6],
        [9, 3, 2, 7],
    ]
    assert hashlib.sha256(repr([large.batch(s) for s in (1, 1562, 1563, 4000)]).encode()).hexdigest() == (
        "04e50bd50c7ce1bc39d5c79d42c099975105a6ab32379c3b8ca1c671b67caff0"
    )


# --- packing ---------------------------------------------------------------------------------------------------------

documents = st.lists(st.integers(1, 100), max_size=80)


@steady
@given(documents, st.integers(1, 300))
def test_packing_holds_every_document_exactly_once_within_the_budget(tokens, budget):
    assume(max(tokens, default=0) <= budget)
    packs = pack(tokens, budget=budget)

    assert sorted(i for members in packs for i in members) == list(range(len(tokens)))
    assert all(sum(tokens[i] for i in members) <= budget for members in packs)
    assert all(members == sorted(members) for members in packs)


@steady
@given(documents, st.integers(100, 300))
def test_packing_is_best_fit_decreasing(tokens, budget):
    """The same as the textbook's slow way: longest first, each to the fullest pack that still has room."""
    packs = []
    for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        fitting = [p for p in packs if sum(tokens[j] for j in p) + tokens[i] <= budget]
        if fitting:
            max(fitting, key=lambda p: sum(tokens[j] for j in p)).append(i)
        else:
            packs.append([i])

    assert pack(tokens, budget=budget) == [sorted(members) for members in packs]


def test_a_document_goes_where_the_least_room_is_left():
    assert pack([60, 50, 40, 30], budget=100) == [[0, 2], [1, 3]]


def test_a_document_that_fits_no_micro_batch_is_refused():
    with pytest.raises(ValueError, match="a document of 101 tokens does not fit a micro-batch of 100"):
        pack([5, 101], budget=100)


def test_nothing_packs_into_nothing():
    assert pack([], budget=100) == []


@steady
@given(documents.filter(bool), st.integers(100, 3000), st.integers(1, 500))
def test_packing_evenly_takes_no_more_micro_batches_and_keeps_to_the_most(tokens, most, grain):
    packs, plain = pack_evenly(tokens, most=most, grain=grain), pack(tokens, budget=most)

    assert sorted(i for members in packs for i in members) == list(range(len(tokens)))
    assert len(packs) == len(plain)
    assert max(sum(tokens[i] for i in members) for members in packs) <= most


def test_packing_evenly_leaves_no_small_rest():
    tokens = [20] * 110  # 2,200 tokens: two micro-batches of 1,000 and a rest of 200, or three of 720 to 740
    sizes = [sum(tokens[i] for i in members) for members in pack_evenly(tokens, most=1000)]

    assert len(sizes) == 3
    assert min(sizes) >= 700


def test_micro_batches_that_are_filled_up_leave_little_to_fill():
    """256 documents as long as GSM8K's, by the plan of an H100: filled up, they are one percent longer at most."""
    draw = random.Random(5)
    for _step in range(20):
        tokens = [min(512, max(60, round(draw.gauss(203, 70)))) for _ in range(256)]
        sizes = [sum(tokens[i] for i in members) for members in pack_evenly(tokens, most=11264, grain=384)]
        filled = sum(-(-size // 384) * 384 for size in sizes)
        assert filled / sum(tokens) < 1.01
        assert min(sizes) > 0.8 * max(sizes)


def test_sizes_are_rounded_up_by_a_little():
    for most in (300, 1024, 2049, 15360, 24576):
        assert grain_of(most) % 64 == 0
        assert most / 32 <= grain_of(most) < 64 + most / 32


def test_what_is_drawn_has_the_shares_of_the_sources():
    course = plan_course(
        examples=[Portion(examples=10, weight=3.0), Portion(examples=100, weight=1.0)],
        batch_size=8,
        steps=5,
        epochs=None,
        seed=0,
    )
    drawn = course.drawn()

    assert drawn == [example for step in range(1, 6) for example in course.batch(step)]
    assert sum(example < 10 for example in drawn) == 30
