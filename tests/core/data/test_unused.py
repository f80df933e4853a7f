"""How many examples may be left out, and what is said of it."""

import pytest

from job.core.data.unused import LeftOut, judge_unused
from job.core.errors import DataError
from job.core.recipe.data_section import DataSection

FILES = DataSection(train=("a",), validation=("b",), prompt="{q} [{c?}]", completion=" {a}")
FRACTION = FILES.model_copy(update={"validation": DataSection(train=("a",), text="{t}").validation})


def left(side="data.train", examples=60, data=FILES, **counts):
    return LeftOut(side=side, data=data, examples=examples, **counts)


def judged(*train, validation=None, **facts):
    held_out = validation or [left("data.validation", 10)]
    return judge_unused(train, held_out, **{"max_length": 64, "longest": 117, "positions": 512} | facts)


def test_more_than_the_limit_is_refused_with_counts_by_reason_and_what_to_change():
    with pytest.raises(DataError) as refused:
        judged(left(without_target=57, empty=1))
    assert str(refused.value) == (
        "data.train: 58 of 60 examples are left out (96.7%), more than data.unused_limit (20.0%) accepts: 57 with "
        "nothing of their answer within max_length 64, 1 with an empty field; raise data.max_length (the longest "
        "example has 117 tokens), or shorten the prompts, or fill the fields in or take those records out, or raise "
        "data.unused_limit (to 0.97)"
    )


def test_what_to_change_is_what_can_be_changed():
    with pytest.raises(DataError, match="shorten the examples \\(the base model has 100 positions\\)") as refused:
        judged(left(too_long=60), positions=100)
    assert "raise" not in str(refused.value)
    assert "data.too_long: truncate" in str(refused.value)


def test_up_to_the_limit_it_is_a_note():
    assert judged(left(too_long=10, without_target=2)) == [
        (
            "data.train: 12 of 60 examples are left out (20.0%): 10 longer than max_length 64, 2 with nothing of their "
            "answer within max_length 64"
        )
    ]
    assert judged(left()) == []
    with pytest.raises(DataError, match="13 of 60"):
        judged(left(too_long=13))


def test_each_side_is_held_to_it_and_a_fraction_is_counted_with_the_rest():
    few = left("data.validation", 4, too_long=3)
    with pytest.raises(DataError, match=r"data\.validation: 3 of 4"):
        judged(left(), validation=[few])
    assert judged(left(data=FRACTION), validation=[few])[0].startswith("data.train: 3 of 64 examples")


def test_each_source_is_held_to_it_by_itself():
    many, few = left("data.train: notes", 600), left("data.train: chats", 10, too_long=6)
    with pytest.raises(DataError, match=r"^data\.train: chats: 6 of 10 examples are left out"):
        judged(many, few)


def test_many_that_are_cut_are_a_note():
    assert judged(left(truncated=12)) == []
    (note,) = judged(left(truncated=13))
    assert note.startswith(
        "data.train: 13 of 60 examples are cut at max_length 64 (21.7%), and learned without their end"
    )


def test_a_field_that_is_empty_too_often_is_answered_with_the_optional_form():
    data = FILES.model_copy(update={"prompt": "{q}\n{c}\n"})
    with pytest.raises(DataError, match=r'\n  data\.prompt: "\{q\}\\n\[\{c\?\}\\n\]"$'):
        judged(left(empty=40, empty_fields=("c",), data=data))
