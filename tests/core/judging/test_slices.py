"""Slices by a field's values: each example in one of them, and a bounded number."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.judging.slices import MOST_VALUES, slices_of


def counts(found):
    return {each.name.words: int(each.members.sum()) for each in found}


def test_the_largest_comes_first_and_what_has_no_value_after_them():
    found = slices_of("lang", ["de", None, "en", "de", "fr", "en", "de"])

    assert counts(found) == {"de": 3, "en": 2, "fr": 1, "(none)": 1}
    assert [*counts(found)] == ["de", "en", "fr", "(none)"]
    assert found[1].members.tolist() == [False, False, True, False, False, True, False]


def test_many_values_share_the_last_slice():
    found = slices_of("id", [f"v{n:03}" for n in range(100)] + ["v000"])

    assert len(found) == MOST_VALUES + 1
    assert found[0].name.words == "v000"
    assert (found[-1].name.folded, found[-1].name.words) == (100 - MOST_VALUES, f"{100 - MOST_VALUES} other values")
    assert counts(found)[found[-1].name.words] == 100 - MOST_VALUES


def test_one_value_too_many_has_its_own_slice_since_folding_it_saves_nothing():
    found = slices_of("id", [str(n) for n in range(MOST_VALUES + 1)])

    assert [each.name.folded for each in found] == [0] * (MOST_VALUES + 1)


def test_a_value_that_is_named_like_the_others_is_no_less_its_own():
    found = slices_of("lang", ["(none)", None])

    assert [(each.name.value, int(each.members.sum())) for each in found] == [("(none)", 1), (None, 1)]


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(st.lists(st.none() | st.text(max_size=100) | st.sampled_from("abcdefghijklmnopqrstuvwxyz"), max_size=80))
def test_each_example_is_in_exactly_one(values):
    found = slices_of("f", values)

    assert len(found) <= MOST_VALUES + 2
    assert (np.sum([each.members for each in found], axis=0) == 1).all() if values else found == []
    assert all(each.members.any() for each in found)
    assert len({each.name for each in found}) == len(found)
