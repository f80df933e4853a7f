"""An answer is computed once for each question; refusals, damaged files and full disks are no bugs."""

import pytest

from job.core.errors import UsageError
from job.edge.remembered import remembered


class Asked:
    def __init__(self, refusal=None):
        self.times, self.refusal = 0, refusal

    def __call__(self):
        self.times += 1
        if self.refusal:
            raise UsageError(self.refusal)
        return f"answer {self.times}"


def test_an_answer_is_computed_once_for_each_question(tmp_path):
    asked = Asked()
    assert [remembered(tmp_path / "kept", {"a": 1}, asked) for _ in range(2)] == ["answer 1", "answer 1"]
    assert remembered(tmp_path / "kept", {"a": 2}, asked) == "answer 2"


def test_a_refusal_is_raised_again(tmp_path):
    asked = Asked("use another base")
    for _ in range(2):
        with pytest.raises(UsageError, match="use another base"):
            remembered(tmp_path, {}, asked)
    assert asked.times == 1


@pytest.mark.parametrize("content", [b"", b"[]", b'{"answer": 1, "refused": false}', b"\xff", b'{"answer": "x'])
def test_what_cannot_be_read_is_computed_again(tmp_path, content):
    asked = Asked()
    remembered(tmp_path, {}, asked)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert remembered(tmp_path, {}, asked) == "answer 2"
    assert remembered(tmp_path, {}, asked) == "answer 2"


def test_where_nothing_can_be_kept_it_is_computed_each_time(tmp_path):
    (tmp_path / "kept").write_text("a file, no folder")
    asked = Asked()
    assert [remembered(tmp_path / "kept", {}, asked) for _ in range(2)] == ["answer 1", "answer 2"]
