"""Templates: optional fields, what vanishes with them, and the form that a message proposes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.recipe.templates import answer_field, filled, parsed, template_fields, with_optional


def text(template, **fields):
    """The template filled in; a field that is not given is not there."""
    values = {name: fields.get(name.replace(".", "_")) for name in template_fields(template)}
    return "".join(each for each, _own in filled(template, values))


ALPACA = "### Instruction:\n{instruction}\n\n[### Input:\n{input?}\n\n]### Response:\n"


def test_what_stands_in_brackets_around_an_optional_field_vanishes_with_it():
    assert text(ALPACA, instruction="a", input="b") == "### Instruction:\na\n\n### Input:\nb\n\n### Response:\n"
    assert text(ALPACA, instruction="a") == "### Instruction:\na\n\n### Response:\n"


@pytest.mark.parametrize(
    ("template", "fields", "made"),
    [
        ("[INST] {q} [/INST]", {"q": "a"}, "[INST] a [/INST]"),
        ("[INST] [<<SYS>>{s?}<</SYS>> ]{q} [/INST]", {"q": "a"}, "[INST] a [/INST]"),
        ("[INST] [<<SYS>>{s?}<</SYS>> ]{q} [/INST]", {"q": "a", "s": "b"}, "[INST] <<SYS>>b<</SYS>> a [/INST]"),
        ("[{q}] {x?}.", {"q": "a"}, "[a] ."),
        ("[{a?} and {b?}]{q}", {"q": "x", "a": "y"}, "x"),
        ("[{a?}[ ({b?})]] {q}", {"q": "x", "a": "y"}, "y x"),
        ("[{a?}[ ({b?})]] {q}", {"q": "x", "b": "y"}, " x"),
        ("[] [x {q}", {"q": "a"}, "[] [x a"),
        ("] {q} [", {"q": "a"}, "] a ["),
        ("{{[{a?}]}} {q}", {"q": "x"}, "{} x"),
        ("{meta.lang}: {q}", {"q": "x", "meta_lang": "de"}, "de: x"),
    ],
)
def test_brackets_without_an_optional_field_are_text(template, fields, made):
    assert text(template, **fields) == made


def test_a_field_that_stands_in_the_record_is_no_template():
    assert text("{a}[ {b?}]", a="{b?} [{x}]", b="[{a}]") == "{b?} [{x}] [{a}]"


@pytest.mark.parametrize("template", ["[Input: {a?} {q}", "x [ {a?}"])
def test_a_group_that_is_not_closed_is_refused(template):
    with pytest.raises(ValueError, match=r"before \{a\?\} is not closed"):
        parsed(template)


def test_the_answer_of_a_text_is_its_last_field_that_must_be_there():
    assert answer_field("{q} {a}[ {why?}]") == "a"
    assert answer_field("{q?} {a?}") == "a"


@pytest.mark.parametrize(
    ("template", "field", "proposed"),
    [
        (ALPACA.replace("[", "").replace("]", "").replace("?", ""), "input", ALPACA),
        ("{q}\n{input}\n", "input", "{q}\n[{input?}\n]"),
        ("Q: {q} Context: {c} A:", "c", "Q: {q}[ Context: {c?}] A:"),
        ("{q}\n\n### Input:\n{input}", "input", "{q}[\n\n### Input:\n{input?}]"),
        ("[INST] {s} {q} [/INST]", "s", "[INST] [{s?} ]{q} [/INST]"),
        ("<<SYS>>\n{s}\n<</SYS>>\n\n{q}", "s", "[<<SYS>>\n{s?}\n<</SYS>>\n\n]{q}"),
        ("Context: {c}\nQuestion: {q}\nAnswer:", "c", "[Context: {c?}\n]Question: {q}\nAnswer:"),
        ("{q} {q}", "q", "{q?} {q?}"),
        ("{c}: {q}", "c", "[{c?}: ]{q}"),
        ("{q}", "other", None),
    ],
)
def test_the_form_that_is_proposed_takes_with_it_what_belongs_to_the_field(template, field, proposed):
    assert with_optional(template, field) == proposed


literals = st.text("a \n#:<>|[]", max_size=12)


@settings(deadline=None, derandomize=True, database=None)
@given(parts=st.lists(literals, min_size=3, max_size=5), which=st.integers(0, 3))
def test_a_record_that_has_the_field_becomes_the_same_text_by_the_form_that_is_proposed(parts, which):
    names = [f"f{number}" for number in range(len(parts) - 1)]
    template = parts[0] + "".join(f"{{{name}}}{part}" for name, part in zip(names, parts[1:], strict=True))
    values = {name: f"<{name}>" for name in names}
    wanted = names[which % len(names)]

    proposed = with_optional(template, wanted)
    if proposed is None:  # brackets of its own stand around it
        assert "[" in template
    else:
        assert text(proposed, **values) == text(template, **values)
        assert f"<{wanted}>" not in text(proposed, **values | {wanted: None})
