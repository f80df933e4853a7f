"""Examples as text for a terminal: marks and colours say the same, no line is too wide, and records obey nobody."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from job.core.data.preview import ExamplePreview, PreviewPiece, SourceTokens
from job.core.lines import cells
from job.render.preview_text import example_lines, preview_lines, token_lines

PAINT = re.compile(r"\x1b\[[0-9;]*m")
often = settings(deadline=None, derandomize=True, database=None, max_examples=200)


def piece(text, *, learned=False, control=False, **other):
    return PreviewPiece(text=text, learned=learned, control=control, **other)


def example(*pieces, **other):
    facts = {"where": "notes.jsonl:7", "source": "notes", "shown": "first", "tokens": 9, "learned": 4, "cut": 0}
    return ExamplePreview(**facts | {"left_out": None} | other, pieces=pieces)


ANSWERED = example(
    piece("<s>", control=True),
    piece("What is\n2 + 2? "),
    piece(" 4 ", learned=True),
    piece("</s>", learned=True, control=True),
)


def test_marks_say_what_is_learned_and_which_blanks_stand_at_the_border():
    assert example_lines(ANSWERED, width=80, colours=False) == [
        "notes.jsonl:7  first of notes  9 tokens, 4 learned",
        "  «<s>»What is↵",
        "  2 + 2?·[learned]·4 «</s>»[/learned]",
    ]


def test_colours_say_what_the_marks_say():
    first, *lines = example_lines(ANSWERED, width=80, colours=True)
    assert PAINT.sub("", first) == "notes.jsonl:7  first of notes  9 tokens, 4 learned"
    assert lines == [
        "  \x1b[35m«<s>»\x1b[0mWhat is↵",
        "  2 + 2?·\x1b[1m▸\x1b[0m\x1b[32m·4 \x1b[0m\x1b[1;32m«</s>»\x1b[0m",
    ]


def test_with_ids_every_token_stands_by_itself():
    shown = example(
        piece("<s>", control=True, ids=(1,), tokens=("<s>",)),
        piece("it's\n", ids=(5, 6), tokens=("it's", "\n")),
        piece(" 4", learned=True, ids=(9,), tokens=(" 4",)),
    )
    [_, body] = example_lines(shown, width=None, colours=False, ids=True)
    assert body == """  «<s>»=1 "it's"=5 '\\n'=6 [learned]' 4'=9 [/learned]"""


def test_learning_that_ends_and_begins_again_is_marked_each_time():
    turns = example(piece("a"), piece("b", learned=True), piece("c"), piece("d", learned=True), piece("e"))
    assert example_lines(turns, width=80, colours=False)[1:] == ["  a[learned]b[/learned]c[learned]d[/learned]e"]


def test_what_is_not_seen_is_said():
    cut = example(piece("x", omitted=0), piece("", omitted=300), tokens=400, cut=12)
    lines = example_lines(cut, width=None, colours=False)
    assert lines[1:] == [
        "  x ... 300 tokens ...",
        "  cut after 388 of 400 tokens: the rest is not seen, and nor is the EOS",
    ]
    lost = example(piece("x"), learned=0, left_out="nothing to learn from")
    assert example_lines(lost, width=None, colours=False)[-1] == "  not trained on: nothing to learn from"


def test_a_secret_in_a_record_is_hidden_also_where_its_tokens_stand_apart():
    shown = example(piece("key hunter2", ids=(1, 2, 3), tokens=("key", " hunt", "er2")), where="hunter2.jsonl:1")

    def hide(text):
        return text.replace("hunter2", "***")

    for ids in (True, False):
        text = "\n".join(example_lines(shown, width=80, colours=False, ids=ids, hide=hide))
        assert "hunt" not in text
        assert "***" in text


texts = st.text(st.sampled_from("ab \n\t\x1b[]·日🐈é\r\x07\u202e"), max_size=60)
some_pieces = st.lists(
    st.builds(PreviewPiece, text=texts, learned=st.booleans(), control=st.booleans(), omitted=st.just(0)), max_size=6
)


@often
@given(pieces=some_pieces, width=st.integers(24, 90), colours=st.booleans())
def test_no_line_is_too_wide_and_no_record_reaches_the_terminal_as_it_is(pieces, width, colours):
    for line in example_lines(example(*pieces), width=width, colours=colours):
        bare = PAINT.sub("", line) if colours else line
        assert cells(bare) <= width
        assert bare.isprintable()


@often
@given(pieces=some_pieces, width=st.integers(24, 90))
def test_breaking_lines_loses_only_blanks_and_paint_nothing(pieces, width):
    def letters(**options):
        return "".join("".join(PAINT.sub("", line).split()) for line in example_lines(example(*pieces), **options))

    whole = letters(width=None, colours=False)
    assert letters(width=width, colours=False) == whole
    assert letters(width=width, colours=True).replace("▸", "") == re.sub(r"\[/?learned\]", "", whole)


def source(name="notes", **other):
    counts = {"examples": 40, "used": 40, "tokens": 1000, "learned": 250, "shortest": 5, "median": 20, "p95": 60}
    return SourceTokens(**{"name": name} | counts | {"longest": 99, "truncated": 0} | other)


def test_the_table_counts_with_denominators_and_fits_80_columns():
    lines = token_lines([source(), source("日本語 " * 20, used=37, truncated=4, tokens=10**9)])
    assert [each.split() for each in lines[1:2]] == [["notes", "40", "1000", "25.0%", "5", "20", "60", "99"]]
    assert [each.strip() for each in lines[3:]] == ["3 of 40 examples left out", "4 of 40 examples cut at max_length"]
    assert max(map(cells, lines)) <= 80


def test_a_preview_is_the_table_the_meaning_of_its_marks_and_the_examples():
    lines = preview_lines([ANSWERED, ANSWERED], [source()], width=80, colours=False, ids=False)
    assert lines[3].startswith("given  [learned]learned[/learned]  «control token»")
    assert lines.count("  «<s>»What is↵") == 2
    assert lines[-1] == "  2 + 2?·[learned]·4 «</s>»[/learned]"
