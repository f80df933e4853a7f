"""What models are judged on: which examples of the regression set belong together."""

import json

import pytest
from tiny import stages_attempt

from job.core.recipe.schema import Recipe
from job.stages.nightly.exams import _read_regression

CUSTOMERS = ("ann", None, "bob", "ann", None, "bob")


def regression(tmp_path, tokenizer, documents, customers, cluster="customer"):
    """The set whose records are of these customers; None: of nobody."""
    rows = [{"q": f"{n} red hats", "a": "more hats"} for n in range(len(customers))]
    for row, customer in zip(rows, customers, strict=True):
        row.update({} if customer is None else {"customer": customer})
    path = tmp_path / "keep.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate(
        {
            "model": {"base": "owner/base", "revision": "c" * 40},
            "data": {"train": "t.jsonl", "validation": "v.jsonl", "prompt": "{q}", "completion": "{a}"},
            "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-3},
            "output": "o",
            "promote": {"channel": "notes", "cluster": cluster, "regression": f"file://{path}"},
        }
    )
    worker = stages_attempt(recipe, tmp_path).worker
    (tmp_path / "regression").mkdir()
    return _read_regression(worker, tokenizer, documents, recipe.promote.regression, tmp_path / "regression").exam


@pytest.mark.parametrize(
    ("customers", "cluster", "found"),
    [
        (CUSTOMERS, "customer", (0, 1, 2, 0, 3, 2)),
        (CUSTOMERS, None, None),
        ((None,) * 6, "customer", None),
    ],
    ids=["some have the field", "none is named", "none has it"],
)
def test_records_of_the_regression_set_with_one_value_of_the_cluster_count_as_one(
    tmp_path, tokenizer, documents, customers, cluster, found
):
    """One without a value depends on no other."""
    exam = regression(tmp_path, tokenizer, documents, customers, cluster)

    assert (len(exam.tokens), exam.cluster, exam.slices) == (6, found, {})
