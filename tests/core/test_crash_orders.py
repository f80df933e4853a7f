"""Crash points: nothing happens unless one is armed, and then it happens there, at the passage that was ordered."""

import ast
from pathlib import Path

import pytest

from job.core.crash_points import POINTS, CrashOrder, crash_point, parse_order, set_order
from job.core.errors import UsageError

JOB = Path(__file__).parents[2] / "job"


@pytest.fixture
def done():
    """What happened; at the end nothing is armed."""
    happened = []
    yield happened
    set_order(None, happened.append)


@pytest.mark.parametrize(
    ("spec", "passage", "deed"),
    [
        ("step.middle", 1, "kill"),
        ("step.middle:3", 3, "kill"),
        ("step.middle=freeze", 1, "freeze"),
        ("step.middle:12=exit", 12, "exit"),
        ("step.middle:1=error", 1, "error"),
        ("step.middle=memory", 1, "memory"),
        ("step.middle:2=panic", 2, "panic"),
    ],
)
def test_an_order_is_a_name_a_passage_and_a_deed(spec, passage, deed):
    assert parse_order(spec) == CrashOrder(name="step.middle", passage=passage, deed=deed)


@pytest.mark.parametrize("spec", ["", "step.middle:0", "step.middle:x", "step.middle:", "step.middle=", "a b", "=kill"])
def test_an_order_written_in_another_way_is_refused(spec):
    with pytest.raises(UsageError, match=r"write it as name\[:n\]\[=deed\]"):
        parse_order(spec)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"'step\.midle' is unknown; there are lock\.acquired, .*step\.middle, "):
        parse_order("step.midle")


def test_an_unknown_deed_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="'burn' is unknown; there are kill, freeze, exit, error"):
        parse_order("step.middle=burn")


def test_unarmed_points_do_nothing():
    assert [crash_point(name) for name in POINTS] == [None] * len(POINTS)


def test_it_happens_at_the_ordered_passage_of_the_ordered_point_and_once(done):
    order = parse_order("step.middle:3")
    set_order(order, done.append)
    seen = []
    for _ in range(5):
        crash_point("step.middle")
        crash_point("save.middle")
        seen.append(len(done))

    assert seen == [0, 0, 1, 1, 1]
    assert done == [order]


def test_each_order_counts_from_its_own_beginning(done):
    for _ in range(2):
        set_order(parse_order("step.middle:2"), done.append)
        crash_point("step.middle")
    assert done == []

    crash_point("step.middle")

    assert len(done) == 1


def calls(source):
    """What is given to each crash_point(...): its name, or None for something computed."""
    return [
        node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) == "crash_point"
    ]


def test_the_points_of_the_job_are_those_of_the_table():
    """A name that no place has would never fire, and the test that orders it would prove nothing."""
    placed = {name for path in JOB.rglob("*.py") for name in calls(path.read_text(encoding="utf-8"))}

    assert placed == POINTS.keys()
    assert calls("crash_point('a')\nc.crash_point(x)\ncrash_point(name='b')") == ["a", None, None]
