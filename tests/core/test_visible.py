"""What strangers wrote is seen, never obeyed."""

import pytest

from job.core.visible import code_span, visible


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain ünïcode 漢字 🙂\n\ttoo", "plain ünïcode 漢字 🙂\n\ttoo"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\rb\x9bc", "a\\rb\\x9bc"),
        ("user\u202egnp.exe", "user\\u202egnp.exe"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_written_as_its_escape(text, seen):
    assert visible(text) == seen


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("s3://b/k.jsonl", "`s3://b/k.jsonl`"),
        ("a`b", "``a`b``"),
        ("`a``b`", "``` `a``b` ```"),
        ("two\n# lines", "`two # lines`"),
        ("<img src=x onerror=alert(1)>", "`<img src=x onerror=alert(1)>`"),
        ("\x1b[2J", "`\\x1b[2J`"),
    ],
)
def test_a_code_span_ends_where_it_should(text, span):
    assert code_span(text) == span
