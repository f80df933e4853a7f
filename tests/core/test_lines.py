"""What a terminal shows is no wider than it is, and nothing of it is lost."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.core.lines import broken, cells, colours_wanted, hung, worth_naming, written_out

WORDS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=120)
LINES = st.lists(WORDS, min_size=1, max_size=30).map(" ".join)


def without_spaces(pieces):
    return re.sub(r"\s", "", "".join(pieces))


@given(text=LINES, width=st.integers(20, 200), indent=st.integers(0, 9), taken=st.integers(0, 15))
def test_no_piece_is_wider_than_the_terminal_but_a_path(text, width, indent, taken):
    first, *rest = broken(text, width, indent=indent, taken=taken)

    assert taken + cells(first) <= width or "/" in first
    assert [piece for piece in rest if cells(piece) > width and ("/" not in piece or " " in piece.strip())] == []
    assert without_spaces([first, *rest]) == without_spaces([text])


@given(text=LINES, width=st.integers(20, 200))
def test_a_line_of_a_report_loses_nothing_when_it_hangs(text, width):
    assert without_spaces(hung(text, width)) == without_spaces([text])


def test_pieces_hang_below_the_column_of_the_first_one():
    assert hung("note   one two three four", 16) == ["note   one two", "       three", "       four"]
    assert hung("one two three four five", 16) == ["one two three", "  four five"]
    assert hung("  data: 12 of them here", 16) == ["  data: 12 of", "    them here"]


def test_a_path_is_kept_whole_and_stands_in_the_first_column():
    uri = "file:///home/somebody/runs/a29da3443a"

    assert hung(f"adapter  {uri} (proven)", 20) == ["adapter", uri, "         (proven)"]


def test_a_pipe_gets_lines_of_any_length():
    assert hung("word " * 100, None) == ["word " * 100]


def test_wide_characters_count_as_two_columns():
    assert [cells(text) for text in ("abc", "漢字", "e\u0301")] == [3, 4, 1]
    assert max(map(cells, broken("漢" * 50, 21))) <= 21


def test_values_are_written_out_without_python_s_brackets():
    values = {"spent": {"encode": 1.5, "inner": {"a": 1}}, "files": ["a", "b"], "none": None, "ok": True, "no": []}

    assert written_out(values) == ["spent.encode=1.5", "spent.inner.a=1", "files=a,b", "none=-", "ok=yes", "no=-"]
    assert written_out({"attempts": [{"n": 1}, {"n": 2}], "empty": {}}) == [
        "attempts.0.n=1",
        "attempts.1.n=2",
        "empty=-",
    ]


def test_what_is_less_than_a_hundredth_is_added_up():
    parts = {"lock": 0.2, "train": 90.0, "encode": 0.3, "load": 9.4, "other": 0.1}

    assert worth_naming(parts) == pytest.approx({"train": 90.0, "load": 9.4, "other": 0.6})
    assert list(worth_naming(parts)) == ["train", "load", "other"]
    assert worth_naming({"train": 3.0}) == {"train": 3.0}
    assert worth_naming({}) == {}


@given(st.dictionaries(st.text(max_size=5), st.floats(0, 1e6)))
def test_no_time_is_lost_when_parts_are_added_up(parts):
    assert sum(worth_naming(parts).values()) == pytest.approx(sum(parts.values()))


@pytest.mark.parametrize(
    ("environment", "terminal", "wanted"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"CLICOLOR_FORCE": "1"}, False, True),
        ({"CLICOLOR_FORCE": "0"}, False, False),
        ({"NO_COLOR": "1", "CLICOLOR_FORCE": "1"}, True, False),
        ({"CLICOLOR": "0"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colours_are_written_as_the_environment_wants_them(environment, terminal, wanted):
    assert colours_wanted(environment, terminal=terminal) is wanted
