"""A chat template that a recipe names as a file: read beside the recipe, and from then on part of it."""

import pytest

from job.core.errors import UsageError
from job.core.recipe.schema import Recipe, identity_of
from job.edge.chat_template_files import with_template_texts

TEXT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def recipe(**data):
    sections = {"model": {"base": "./b"}, "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-4}, "output": "o"}
    return Recipe.model_validate({**sections, "data": {"train": "t.jsonl", "chat": "messages", **data}})


@pytest.mark.parametrize("name", ["own.jinja", "folder/own.jinja"])
def test_a_file_is_read_beside_the_recipe_and_is_part_of_the_run(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("\ufeff" + TEXT, encoding="utf-8")
    found = with_template_texts(recipe(chat_template=name), beside=tmp_path)
    assert found.data.chat_template == TEXT
    assert identity_of(found)["data"]["chat_template"] == TEXT
    assert with_template_texts(found, beside=tmp_path / "elsewhere") == found


def test_every_source_may_have_its_own(tmp_path):
    (tmp_path / "own.jinja").write_text(TEXT, encoding="utf-8")
    sources = [
        {"uri": "a.jsonl", "chat": "messages", "chat_template": "own.jinja"},
        {"uri": "b.jsonl", "chat": "messages", "chat_template": "chatml"},
        {"uri": "c.jsonl"},
    ]
    found = with_template_texts(recipe(train=sources), beside=tmp_path)
    assert [source.chat_template for source in found.data.train] == [TEXT, "chatml", None]


def test_a_recipe_without_a_file_stays_as_it_is(tmp_path):
    for data in ({}, {"chat_template": "alpaca"}, {"chat_template": TEXT}):
        assert with_template_texts(recipe(**data), beside=tmp_path) == recipe(**data)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "own.jinja: cannot be read"),
        (b"\xff", "own.jinja: cannot be read"),
        (b"plain", "it is no Jinja template"),
        (b"{{" + b"x" * 2**20, "longer than 1,048,576 bytes"),
    ],
)
def test_what_is_no_template_is_refused_with_its_name(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        with_template_texts(recipe(chat_template="own.jinja"), beside=tmp_path)
