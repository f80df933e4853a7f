"""What makes an answer right: each metric's edge cases, and that no answer of a model can hold a run up."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from job.core.judging import answer_metrics
from job.core.judging.answer_metrics import MOST_WORDS, AnswerMetric, why_no_pattern

EXACT, CONTAINS, JSON, ROUGE = (
    AnswerMetric(name=name) for name in ("exact_match", "contains", "json_equal", "rouge_l")
)
GSM8K = AnswerMetric(name="pattern", pattern=r"#### (-?[0-9]+(?:[.,][0-9]+)*)")
quick = settings(deadline=None, derandomize=True, database=None, max_examples=100)


@pytest.mark.parametrize(
    ("metric", "learned", "answer", "score"),
    [
        (EXACT, " 72\n", "72 ", 1),
        (EXACT, "72", "72.", 0),
        (CONTAINS, "Oslo", "It is Oslo, I think.", 1),
        (CONTAINS, "Oslo", "oslo", 0),
        (GSM8K, "48 + 24 = 72\n#### 72", "That makes\n#### 72\n", 1),
        (GSM8K, "#### 72", "#### 72.", 1),
        (GSM8K, "#### 1,072.5", "It is #### 1,072.5, so", 1),
        (GSM8K, "#### 72", "#### 7", 0),
        (GSM8K, "#### 72", "72", 0),
        (GSM8K, "#### 72", "", 0),
        (GSM8K, "#### 72", "#### 72\n\nQuestion: the next one\n#### 5", 1),
        (AnswerMetric(name="pattern", pattern="yes|no"), "so yes", "yes, or no", 1),
        (AnswerMetric(name="pattern", pattern="(?i)answer: *([a-d])?"), "Answer: c", "answer:", 0),
        (JSON, '{"a": 1, "b": [true, null]}', ' {"b": [true, null], "a": 1.0}\n', 1),
        (JSON, "1", "true", 0),
        (JSON, "0", "false", 0),
        (JSON, "[1, 2]", "[2, 1]", 0),
        (JSON, "[1]", "[1, 2]", 0),
        (JSON, '{"a": 1}', '{"a": 1, "b": 2}', 0),
        (JSON, '{"a": 1}', 'Sure: {"a": 1}', 0),
        (JSON, "10000000000000000001", "10000000000000000000", 0),
        (JSON, "0.1", "0.10", 1),
        (JSON, "1", "NaN", 0),
        (JSON, "1", "1e999999999999999999999", 0),
        (JSON, '"é"', '"\\u00e9"', 1),
    ],
)
def test_an_answer_is_right_or_wrong(metric, learned, answer, score):
    assert metric.score(metric.reference(learned), answer) == score


@pytest.mark.parametrize(
    ("metric", "text"),
    [(EXACT, "  "), (CONTAINS, ""), (GSM8K, "72"), (JSON, "four"), (JSON, "[" * 100_000), (ROUGE, "?!"), (JSON, "NaN")],
)
def test_what_holds_nothing_to_compare_with_is_no_reference(metric, text):
    assert metric.reference(text) is None


def test_a_field_may_hold_the_bare_value_and_the_learned_answer_may_not():
    of_field = AnswerMetric(name="pattern", pattern=GSM8K.pattern, field="final")

    assert of_field.reference("72") == of_field.reference("so #### 72") == "72"
    assert of_field.reference(" ") is None
    assert GSM8K.reference("72") is None


@pytest.mark.parametrize("answer", ["[" * 100_000, "9" * 100_000, "a" * 2**20, "\x00\ud7ff" * 1000, '{"a":' * 5000])
def test_no_answer_breaks_a_metric(answer):
    for metric, learned in ((EXACT, "x"), (CONTAINS, "x"), (JSON, "[1]"), (GSM8K, "#### 1"), (ROUGE, "a b")):
        assert metric.score(metric.reference(learned), answer) < 0.1


def test_no_pattern_is_tried_in_every_way():
    """Engines that go back need 2^n tries here: this test would not end."""
    for pattern in ("(?:a+)+b", "(?:a|a)*b", "(?:a*)*b", "(?:[a-z]+ ?)+!"):
        metric = AnswerMetric(name="pattern", pattern=pattern)
        assert metric.score("b", "a" * 200_000) == 0


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(?=a)b", "look-ahead"),
        (r"(a)\1", "back-references"),
        ("(", "missing )"),
        ("(a)(b)", "2 groups"),
        ("a*", "empty text"),
        ("(?:(?:a{1,1000}){1,1000})", "repetition size"),
        ("\ud800", "surrogate"),
    ],
)
def test_a_pattern_that_cannot_be_one_is_refused_with_the_reason(pattern, said, capfd):
    assert said in why_no_pattern(pattern)
    assert capfd.readouterr() == ("", "")
    assert why_no_pattern(GSM8K.pattern) is None


ascii_texts = st.text(st.sampled_from("abc XYZ 019 .,_-\n"), max_size=60)


@quick
@given(ascii_texts, ascii_texts)
def test_rouge_of_ascii_is_that_of_rouge_score_itself(one, other):
    expected = RougeScorer(["rougeL"]).score(one, other)["rougeL"].fmeasure

    assert ROUGE.score(one, other) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["Das Mädchen ist Zoë.", "猫が魚を食べる", "الولد يقرأ كتابا", "यह हिन्दी भाषा है", "แมวกินปลา"]
)
def test_rouge_knows_letters_of_every_script(text):
    """rouge-score's own words are of a to z: of most languages it would say 0 whatever is written."""
    assert ROUGE.score(ROUGE.reference(text), text.upper()) == 1
    assert 0 < ROUGE.score(text, text[: len(text) // 2]) < 1
    assert ROUGE.score(text, "zzz") == 0


def test_rouge_looks_for_no_more_words_than_it_takes(monkeypatch):
    """Of a text of a million words, which would take minutes for each example."""
    compiled, looked_at = answer_metrics._compiled, []

    class Watched:
        def __init__(self, pattern):
            self._pattern = compiled(pattern)

        def finditer(self, text):
            for each in self._pattern.finditer(text):
                looked_at.append(each)
                yield each

    monkeypatch.setattr(answer_metrics, "_compiled", Watched)
    rouge = AnswerMetric(name="rouge_l")

    assert rouge.score("w " * 50_000, "w " * 50_000) == 1.0
    assert len(looked_at) == 2 * MOST_WORDS


@pytest.mark.parametrize(
    ("text", "words"),
    [("猫が好き abc漢x", "猫 が 好 き abc 漢 x"), ("๏ ไท ok", "ไ ท ok"), ("e\u0301a, ½x_y", "e\u0301a ½x y")],
)
def test_rouge_s_words_are_letters_of_scripts_without_spaces_and_else_runs_of_them(text, words):
    assert answer_metrics._words(text) == words.split()


def test_rouge_takes_the_first_words_of_a_long_text():
    words = [f"w{n}" for n in range(2 * MOST_WORDS)]

    assert ROUGE.score(" ".join(words), " ".join(words[:MOST_WORDS])) == 1
    assert ROUGE.score(" ".join(words), " ".join(words[MOST_WORDS:])) == 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@quick
@given(values, values)
def test_a_value_equals_itself_however_it_is_written_and_equality_goes_both_ways(value, other):
    plain, indented = json.dumps(value), json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)

    assert JSON.score(plain, indented) == 1
    assert JSON.score(plain, json.dumps(other)) == JSON.score(json.dumps(other), plain)
