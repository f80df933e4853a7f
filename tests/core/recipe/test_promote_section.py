"""The recipe's `promote` section: what goes together, what does not, and what of it makes another run."""

import pytest
from channel_material import judged
from pydantic import ValidationError

from job.core.judging.paired import SMALLEST_P
from job.core.nightly.error_budget import open_budget, quiet_level, spend
from job.core.nightly.gate import shares_of
from job.core.recipe.schema import Recipe, identity_of

OF_TWO_SEEDS = SMALLEST_P / quiet_level(1.0)
LEAST = SMALLEST_P / shares_of(quiet_level(1.0))[0]
"""Of `wrong_per_year`: the level of the frozen examples on a night that saves is then the smallest p there is."""


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
        ({}, {"wrong_per_year": 0.99 * LEAST}, "would never promote a model, however much better; give 0.0[0-9]+ or"),
        ({}, {"wrong_per_year": 0.99 * OF_TWO_SEEDS, "seeds": 2}, "would never promote a model"),
        ({}, {"wrong_per_yaer": 1.0}, "promote.wrong_per_yaer"),
    ],
)
def test_what_cannot_be_judged_or_said_is_refused(data, promote, told):
    with pytest.raises(ValidationError, match=told):
        recipe(data, **{"channel": "notes"} | promote)


@pytest.mark.parametrize(("per_year", "seeds"), [(1.01 * LEAST, 1), (1.01 * OF_TWO_SEEDS, 2)])
def test_at_the_least_that_may_be_wrong_a_model_that_is_surely_better_is_promoted_on_any_night(per_year, seeds):
    """Also on one of a year of nights that save."""
    promote = recipe(channel="notes", wrong_per_year=per_year, seeds=seeds).promote
    budget, level = open_budget(740_000, per_year=promote.wrong_per_year), 0.0
    for night in range(400):
        day = 740_000 + night
        budget, level = spend(budget, f"run-{night}", day, per_year=promote.wrong_per_year, saves=True)
    found = judged(gain=0.5, level=level, seeds=(0.5,) * (seeds - 1))
    assert found.gap.p_better == SMALLEST_P
    assert found.decision.promoted


def test_a_channel_makes_no_other_run_and_what_a_run_starts_from_does():
    plain = identity_of(recipe())

    assert identity_of(recipe(channel="notes", cluster="c", seeds=2, max_drift=0.5)) == plain
    assert identity_of(recipe(channel="notes", start_from="promoted")) != plain
    assert "promote" not in plain


def test_the_fields_that_are_read_stand_once():
    assert recipe(channel="notes", cluster="a", slices=["b", "a"]).promote.fields == ("a", "b")
