"""The recipe's words on answers and slices: what goes together, and that saying nothing changes no run."""

import pytest

from job.core.recipe.schema import Recipe, identity_of

SMALL = {
    "model": {"base": "./base"},
    "data": {"train": "a.jsonl", "prompt": "{q}", "completion": "{a}"},
    "train": {"steps": 5, "batch_size": 2, "learning_rate": 1e-4},
    "output": "./out",
}


def recipe(**evaluate):
    return Recipe.model_validate(SMALL | {"evaluate": evaluate})


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"answers": 5, "metric": "pattern"}, "`metric: pattern` and `pattern` go together"),
        ({"answers": 5, "pattern": "a"}, "`metric: pattern` and `pattern` go together"),
        ({"answers": 5, "metric": "pattern", "pattern": "(?=a)"}, "look-ahead"),
        ({"metric": "contains"}, "give `answers`"),
        ({"metric_field": "final"}, "give `answers`"),
        ({"answers": 5, "metric": "bleu"}, "rouge_l"),
        ({"slices": ["lang", "lang"]}, "twice"),
        ({"slices": [f"f{n}" for n in range(9)]}, "at most 8"),
    ],
)
def test_what_does_not_go_together_is_refused(evaluate, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        recipe(**evaluate)


def test_a_run_that_says_nothing_of_metrics_is_the_one_that_it_was():
    keys = {"metric", "pattern", "metric_field", "slices"}

    assert keys & identity_of(recipe())["evaluate"].keys() == set()
    assert identity_of(recipe(answers=3, metric="exact_match", slices=[])) == identity_of(recipe(answers=3))
    for change in ({"metric": "contains"}, {"metric_field": "f"}, {"slices": ["lang"]}):
        assert identity_of(recipe(answers=3, **change)) != identity_of(recipe(answers=3))


def test_the_fields_that_are_kept_are_those_that_are_named_each_once():
    assert recipe(answers=3, metric_field="a", slices=["b", "a"]).evaluate.kept_fields == ("b", "a")
    assert recipe().evaluate.kept_fields == ()
