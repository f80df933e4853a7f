import json
import re

import pytest

from bench import answers


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"q": " ".join(str(n * k % 97) for k in range(1, 3 + n)), "a": "1"} for n in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_models_answer_and_the_section_says_how_fast_beside_generate(base, questions, tmp_path):
    results = tmp_path / "RESULTS.md"
    options = ["--questions", "6", "--longest", "5", "--beside", "4", "--prompt", "{q}", "--device", "cpu"]
    answers.main(["--base", str(base), "--train", str(questions), "--results", str(results), *options])
    text = results.read_text()

    assert "python -m bench.answers --base FOLDER --train TRAIN.jsonl --questions 6 --longest 5 --beside 4" in text
    rows = re.findall(
        r"^\| (base|tuned) \| 6 \| [\d.]+ \| [\d,]+ \| [\d,]+ \| [\d.]+ \| ([\d.]+)% \|$", text, re.MULTILINE
    )
    assert [name for name, _ in rows] == ["base", "tuned"]
    assert str(tmp_path) not in text


def test_tokens_are_the_same_up_to_the_first_that_is_not():
    assert answers.same_share([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == 4 / 6
