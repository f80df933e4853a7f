"""The last endings as text: one block each, and nothing of a stranger's is obeyed."""

from hypothesis import given
from hypothesis import strategies as st

from job.core.attempt.ended import Ended
from job.render.endings_text import endings_lines


def an_ending(**facts):
    known = {"time": "2026-11-28T21:05:28+00:00", "code": 65, "again": "no", "reason": "r", "action": "a", "host": "n1"}
    return Ended(**known | facts)


def test_an_ending_says_when_which_code_where_why_and_what_to_do():
    lines = endings_lines(
        [
            an_ending(recipe="night.yaml", reason="train.jsonl:17: not JSON\nsecond line"),
            an_ending(code=None, run_uri="s3://b/p/runs/r-1", attempt=2, last_committed_step=40),
            an_ending(code=0, reason="done"),
        ]
    )

    assert lines == [
        "",
        "last endings, newest first:",
        "",
        "  2026-11-28T21:05:28+00:00  65      on n1, night.yaml",
        "    train.jsonl:17: not JSON second line",
        "    to do: a",
        "",
        "  2026-11-28T21:05:28+00:00  killed  on n1, run r-1, attempt 2, step 40 committed",
        "    r",
        "    to do: a",
        "",
        "  2026-11-28T21:05:28+00:00  0       on n1",
        "    done",
    ]


def test_no_endings_are_no_lines():
    assert endings_lines([]) == []


@given(st.text(max_size=400), st.text(max_size=400), st.text(max_size=400))
def test_whatever_stands_in_one_is_a_few_lines_that_can_be_printed(reason, action, host):
    lines = endings_lines([an_ending(reason=reason, action=action, host=host, recipe=host, run_uri=reason)])

    assert len(lines) == 6
    assert all(line.isprintable() and len(line) < 400 for line in lines)
