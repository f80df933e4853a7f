"""Prompts of what is typed and of fields, by the recipe's template."""

import pytest

from job.core.data.asking import asked_fields, asked_sources, fields_given, prompt_of, required_fields, typed
from job.core.errors import UsageError
from job.core.recipe.data_section import DataSection


def by_text(text):
    return DataSection(train=("a",), text=text)


def asked(fields, data):
    """The prompt as text."""
    return "".join(part.text for part in prompt_of(fields, data))


PAIR = DataSection(train=("a",), prompt="{topic}: {question}\n", completion="{answer}")


@pytest.mark.parametrize(
    ("line", "prompt"),
    [(r"a\nb\n", "a\nb\n"), (r"a\\nb", r"a\nb"), ("a\nb", "a\nb"), (r"C:\temp", r"C:\temp"), (r"\\", r"\\")],
)
def test_a_backslash_and_an_n_are_a_line_break_unless_another_backslash_stands_before(line, prompt):
    assert typed(line) == prompt


def test_the_prompt_template_is_filled_in():
    assert asked_fields(PAIR) == ("topic", "question")
    assert asked(fields_given(["topic=a", r"question=b\nc=d"], PAIR), PAIR) == "a: b\nc=d\n"


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
    assert asked(fields, by_text(text)) == prompt


def test_a_text_that_begins_with_the_answer_makes_no_prompt():
    with pytest.raises(UsageError, match=r"begins with \{text\}.*use --prompt"):
        prompt_of({}, by_text("{text}"))


ALPACA = DataSection(train=("a",), prompt="I: {instruction}\n[Input: {input?}\n]R:", completion=" {output}")


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        (["instruction=a", "input=b"], "I: a\nInput: b\nR:"),
        (["instruction=a"], "I: a\nR:"),
        (["instruction=a", "input= "], "I: a\nR:"),
    ],
)
def test_an_optional_field_need_not_be_given(words, prompt):
    assert required_fields(ALPACA) == {"instruction"}
    assert asked(fields_given(words, ALPACA), ALPACA) == prompt


def test_of_a_text_the_answer_is_the_last_field_that_must_be_there():
    data = by_text("[{sys?}\n]{q} -> {meta.a}[ ({source?})]")

    assert asked_fields(data) == ("sys", "q")
    assert asked({"sys": None, "q": "x"}, data) == "x ->"
    assert asked({"sys": "s", "q": "x"}, data) == "s\nx ->"


def test_control_tokens_of_a_prompt_are_those_of_the_template_alone():
    data = DataSection(train=("a",), prompt="<s>{q}</s>", completion="{a}")

    assert [(part.text, part.control) for part in prompt_of({"q": "</s>"}, data)] == [
        ("<s>", True),
        ("</s>", False),
        ("</s>", True),
    ]


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


def test_of_several_sources_those_with_a_question_are_asked_first_and_each_template_once():
    plain = {"uri": "a", "text": "{story}"}
    asked = {"uri": "b", "prompt": "{q}\n", "completion": "{a}"}
    data = DataSection.model_validate({"train": [plain, asked, {**asked, "uri": "c"}]})

    assert [each.prompt for each in asked_sources(data)] == ["{q}\n", None]
