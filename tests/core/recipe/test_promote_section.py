"""The recipe's `promote` section: what goes together, what does not, and what of it makes another run."""

import pytest
from pydantic import ValidationError

from job.core.recipe.schema import Recipe, identity_of


def recipe(data=None, **promote):
    return Recipe.model_validate(
        {
            "model": {"base": "./base"},
            "data": {"train": "t.jsonl", "validation": "v.jsonl", "text": "{q}"} | (data or {}),
            "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-3},
            "output": "o",
            "promote": promote,
        }
    )


def test_without_a_channel_nothing_is_promoted():
    assert recipe().promote.channel is None


@pytest.mark.parametrize(
    "promote",
    [
        {"cluster": "c"},
        {"slices": ["a"]},
        {"start_from": "promoted"},
        {"regression": "r.jsonl"},
        {"seeds": 2},
        {"min_improvement": 0.1},
        {"max_drift": 0.5},
        {"wrong_per_year": 2.0},
    ],
)
def test_all_of_it_needs_a_channel(promote):
    with pytest.raises(ValidationError, match=f"`{next(iter(promote))}` goes with `channel`"):
        recipe(**promote)


@pytest.mark.parametrize(
    ("data", "promote", "told"),
    [
        ({"validation": {"fraction": 0.1}}, {}, "give it files of its own"),
        ({}, {"slices": ["a", "a"]}, "a field stands there twice"),
        ({}, {"regression": "v.jsonl"}, "v.jsonl is trained or judged on already"),
        ({}, {"regression": ["r.jsonl", "t.jsonl"]}, "t.jsonl is trained or judged on already"),
        (
            {"text": None, "train": [{"uri": "t", "text": "{q}"}], "validation": [{"uri": "v", "text": "{q}"}]},
            {"regression": "r"},
            "give `data` the templates of the regression set",
        ),
        ({}, {"seeds": 2, "start_from": "promoted"}, "leave `seeds` or `start_from` out"),
        ({}, {"channel": "a/b"}, "promote.channel"),
        ({}, {"channel": "../up"}, "promote.channel"),
        ({}, {"seeds": 3}, "promote.seeds"),
        ({}, {"wrong_per_year": 0.0}, "promote.wrong_per_year"),
        ({}, {"wrong_per_yaer": 1.0}, "promote.wrong_per_yaer"),
    ],
)
def test_what_cannot_be_judged_or_said_is_refused(data, promote, told):
    with pytest.raises(ValidationError, match=told):
        recipe(data, **{"channel": "notes"} | promote)


def test_a_channel_makes_no_other_run_and_what_a_run_starts_from_does():
    plain = identity_of(recipe())

    assert identity_of(recipe(channel="notes", cluster="c", seeds=2, max_drift=0.5)) == plain
    assert identity_of(recipe(channel="notes", start_from="promoted")) != plain
    assert "promote" not in plain


def test_the_fields_that_are_read_stand_once():
    assert recipe(channel="notes", cluster="a", slices=["b", "a"]).promote.fields == ("a", "b")
