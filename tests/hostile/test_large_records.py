"""Records of megabytes: too long by themselves, or so many at once."""

import json

import pytest


def record(size):
    return json.dumps({"question": "12 red hats", "answer": "red 12 " * (size // 7)}) + "\n"


@pytest.mark.parametrize(("count", "size"), [(40, 3 * 10**6), (1, 63 * 10**6)], ids=["3 MB", "63 MB"])
def test_records_of_megabytes_are_wrong_lines(job, count, size):
    with (job.data / "train.jsonl").open("a") as file:
        file.writelines(record(size) for _ in range(count))
    ended = job.attacked(mib=1024)
    assert ended.code == ended.outcome["code"] == 65, ended.stdout
    assert "train.jsonl:25: longer than data.max_record (1,048,576 bytes)" in ended.outcome["reason"]


def test_a_long_first_record_behind_a_byte_order_mark_is_told_as_long(job):
    (job.data / "train.jsonl").write_text("\ufeff" + record(3 * 10**6))
    ended = job.attacked(mib=1024)
    assert "train.jsonl:1: longer than data.max_record" in ended.outcome["reason"]


@pytest.mark.parametrize("count", [24, pytest.param(40, marks=pytest.mark.hostile)])
def test_many_records_just_below_the_limit_are_encoded_a_few_at_a_time(job, count):
    """A thousand at once would take tens of gigabytes."""
    with (job.data / "train.jsonl").open("a") as file:
        file.writelines(record(10**6) for _ in range(count))
    ended = job.attacked("check", mib=1024)
    assert ended.code == 0, ended.stdout + ended.stderr


@pytest.mark.hostile
def test_records_of_3_mb_are_encoded_where_the_recipe_allows_them(job):
    job.recipe["data"]["max_record"] = 2**22
    with (job.data / "train.jsonl").open("a") as file:
        file.writelines(record(3 * 10**6) for _ in range(40))
    ended = job.attacked("check", mib=2048)
    assert ended.code == 0, ended.stdout + ended.stderr
