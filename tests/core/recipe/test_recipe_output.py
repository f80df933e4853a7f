"""Where a wrong recipe is said to be wrong: the output that it names all the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.core.given import Given
from job.core.recipe.text import named_output


def given_by(*texts):
    return [Given(text=text, source="--set") for text in texts]


@pytest.mark.parametrize(
    ("text", "overrides", "output"),
    [
        ("model: {bese: x}\noutput: s3://b/p\n", [], "s3://b/p"),
        ("output: s3://b/p\nlora: [1\n", [], "s3://b/p"),
        ("output: s3://b/p\noutput: s3://c\n", [], "s3://b/p"),
        ("output: s3://b/p\n", ['output="s3://c/q"'], "s3://c/q"),
        ("", ['output="s3://c/q"'], "s3://c/q"),
        ("lora: [1\n", ["nonsense", "output=s3://c"], "s3://c"),
        ("output: 5\n", [], None),
        ("output: ''\n", [], None),
        ("output: s3://key:secret@b/p\n", [], None),
        ("- a list\n", [], None),
        ("model:\n  output: s3://b\n", [], None),
    ],
)
def test_the_output_is_found_where_the_rest_is_wrong(text, overrides, output):
    assert named_output(text, given_by(*overrides)) == output


@given(st.text(), st.lists(st.text(), max_size=3))
def test_any_text_names_one_or_none(text, overrides):
    found = named_output(text, given_by(*overrides))

    assert found is None or isinstance(found, str)
