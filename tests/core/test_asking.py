"""Prompts of what is typed and of fields, by the recipe's template."""

import pytest

from job.core.asking import asked_fields, fields_given, prompt_of, typed
from job.core.data_section import DataSection
from job.core.errors import UsageError


def by_text(text):
    return DataSection(train=("a",), text=text)


PAIR = DataSection(train=("a",), prompt="{topic}: {question}\n", completion="{answer}")


@pytest.mark.parametrize(
    ("line", "prompt"),
    [(r"a\nb\n", "a\nb\n"), (r"a\\nb", r"a\nb"), ("a\nb", "a\nb"), (r"C:\temp", r"C:\temp"), (r"\\", r"\\")],
)
def test_a_backslash_and_an_n_are_a_line_break_unless_another_backslash_stands_before(line, prompt):
    assert typed(line) == prompt


def test_the_prompt_template_is_filled_in():
    assert asked_fields(PAIR) == ("topic", "question")
    assert prompt_of(fields_given(["topic=a", r"question=b\nc=d"], PAIR), PAIR) == "a: b\nc=d\n"


@pytest.mark.parametrize(
    ("text", "fields", "prompt"),
    [
        ("### Question: {input}\n ### Answer: {output}", {"input": "2 + 2?"}, "### Question: 2 + 2?\n ### Answer:"),
        ("### A note by Eevee: {note}", {}, "### A note by Eevee:"),
        ("{{{a}}} -> {b}{{end}}", {"a": "x"}, "{x} ->"),
    ],
)
def test_a_text_is_filled_in_up_to_its_last_field_which_is_the_answer(text, fields, prompt):
    assert asked_fields(by_text(text)) == tuple(fields)
    assert prompt_of(fields, by_text(text)) == prompt


def test_a_text_that_begins_with_the_answer_makes_no_prompt():
    with pytest.raises(UsageError, match=r"begins with \{text\}.*use --prompt"):
        prompt_of({}, by_text("{text}"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["topic=a"], "give question as well"),
        (["topic=a", "question=b", "answer=c"], "--field answer: the prompt of this run is made of topic, question"),
        (["topics=a"], "did you mean topic?"),
        (["topic"], "--field topic: write name=value"),
    ],
)
def test_a_wrong_field_is_told_with_those_that_there_are(words, told):
    with pytest.raises(UsageError, match=told.replace("?", r"\?")):
        fields_given(words, PAIR)
