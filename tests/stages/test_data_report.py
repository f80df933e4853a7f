"""Which examples were left out, as the report names them: by file and line, and not all of thousands."""

import numpy as np
import pytest

from job.stages.data.data_report import _first_left_out
from job.tune.data.documents import select_documents


class Encoded:
    """Examples of so many tokens, the last of each learned if any."""

    def __init__(self, lengths, learned):
        self.lengths, self._learned = np.array(lengths), np.array(learned)

    def __len__(self):
        return len(self.lengths)

    def target_counts(self, max_length):
        return np.maximum(self._learned - np.maximum(self.lengths - max_length, 0), 0)

    def where(self, index):
        return f"train.jsonl:{index + 1}"


@pytest.fixture
def named():
    def named(lengths, learned, too_long):
        found = _first_left_out(select_documents(Encoded(lengths, learned), max_length=512, too_long=too_long))
        return [(line.where, line.reason) for line in found]

    return named


def test_an_example_that_is_dropped_or_has_nothing_to_learn_is_named_with_the_reason(named):
    examples = [100, 1700, 40, 600], [10, 100, 0, 88]

    assert named(*examples, "drop") == [
        ("train.jsonl:2", "too long: 1,700 tokens, more than max_length 512"),
        ("train.jsonl:4", "too long: 600 tokens, more than max_length 512"),
        ("train.jsonl:3", "nothing to learn among its 40 tokens"),
    ]
    assert named(*examples, "truncate") == [
        ("train.jsonl:2", "nothing to learn among its first 512 of 1,700 tokens"),
        ("train.jsonl:3", "nothing to learn among its 40 tokens"),
        ("train.jsonl:4", "nothing to learn among its first 512 of 600 tokens"),
    ]


def test_of_thousands_the_first_ten_of_each_kind_are_named(named):
    found = named([10] + [600] * 2000 + [20] * 2000, [5] + [5] * 2000 + [0] * 2000, "drop")

    assert [where for where, _ in found] == [f"train.jsonl:{n}" for n in (*range(2, 12), *range(2002, 2012))]
