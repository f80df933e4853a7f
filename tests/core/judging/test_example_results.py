"""Each example's line beside a report: written and read again, refused when changed, compared with the run before."""

import numpy as np
import pytest

from job.core.judging.example_results import (
    ExampleResult,
    described,
    judges_alike,
    loss_change,
    read,
    score_change,
    validation_hash,
    written,
)
from job.core.judging.judged_answers import Gain, MetricReport


def results(losses, *, scores=None, tokens=10):
    scores = scores if scores is not None else [None] * len(losses)
    return [
        ExampleResult(
            example=f"{n:032x}",
            where=f"valid.jsonl:{n + 1}",
            tokens=tokens,
            base_loss=2.0,
            tuned_loss=float(loss),
            base_score=score,
            tuned_score=score,
        )
        for n, (loss, score) in enumerate(zip(losses, scores, strict=True))
    ]


def test_what_is_written_is_read_again_to_the_last_digit():
    found = results(np.random.default_rng(0).gamma(1, 1, 50), scores=[0.1 * (n % 7) for n in range(50)])
    content = written(found)

    assert content.count(b"\n") == 50
    assert read(content, described(content, found)) == found


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c.replace(b"2.0", b"3.0", 1), lambda _: b""])
def test_a_file_that_is_not_the_report_s_is_refused(change):
    found = results([1.0, 0.5])
    content = written(found)
    with pytest.raises(ValueError, match="bytes are not those"):
        read(change(content), described(content, found))


@pytest.mark.parametrize("line", [b"5\n", b'{"a": 1}\n', b"\xff\n", b'{"example":"x"\n', b"NaN\n"])
def test_lines_that_are_none_are_refused_even_with_their_own_hash(line):
    described_as = described(line, results([1.0]))
    with pytest.raises(ValueError, match=r".+"):
        read(line, described_as)
    more = written(results([1.0, 2.0]))
    with pytest.raises(ValueError, match="examples are not those"):
        read(more, described(more, results([1.0])))


def test_the_set_has_one_name_in_whatever_order_and_another_by_another_tokenizer():
    found = results([1.0, 0.5, 0.25])

    assert validation_hash(found) == validation_hash(found[::-1]) == validation_hash(results([3.0, 3.0, 3.0]))
    assert validation_hash(found) != validation_hash(found[:2])
    assert validation_hash(found) != validation_hash(results([1.0, 0.5, 0.25], tokens=11))


def test_two_runs_are_compared_example_by_example():
    draw = np.random.default_rng(1)
    hard = draw.gamma(2, 1, 200)
    before, now = results(hard), results(hard - 0.01 * draw.random(200))
    found = loss_change(before, now[::-1])

    assert found.examples == 200
    assert found.change == pytest.approx(found.after - found.before, abs=1e-5)
    assert found.low < found.change < found.high < 0


def test_few_examples_have_no_interval():
    found = loss_change(results([1.0, 2.0]), results([0.5, 1.0]))

    assert (found.change, found.low, found.high) == (-0.75, None, None)


def test_scores_are_compared_where_both_judged():
    before = results([1.0] * 4, scores=[0.0, 1.0, None, 0.5])
    now = results([1.0] * 4, scores=[1.0, 1.0, 1.0, None])
    found = score_change(before, now)

    assert (found.examples, found.before, found.after) == (2, 0.5, 1.0)
    assert score_change(results([1.0]), results([1.0])) is None


def test_scores_of_another_metric_mean_something_else():
    scores = Gain(examples=3, before=0, after=1, gain=1)
    one = MetricReport(name="pattern", pattern="a", max_new_tokens=8, scores=scores)

    assert judges_alike(one, one.model_copy(update={"not_judged": 5}))
    for change in ({"name": "contains"}, {"pattern": "b"}, {"field": "x"}, {"max_new_tokens": 9}):
        assert not judges_alike(one, one.model_copy(update=change))
    assert not judges_alike(one, None)
    assert not judges_alike(None, None)
