"""The page and the terminal on metrics, slices and the run before: what they say, and when they say nothing."""

import re

from page_reports import gsm8k, small

from job.core.judging.example_results import ChangeReport, LossChange
from job.core.judging.judged_answers import Gain, MetricReport, SliceGain, SourceGain
from job.core.judging.slices import SliceLoss, SliceName
from job.render.page.finished import report_html
from job.render.report_text import report_lines

SURE = Gain(examples=400, before=0.125, after=0.5, gain=0.375, low=0.3275, high=0.42)
MAYBE = Gain(examples=40, before=0.1, after=0.125, gain=0.025, low=-0.05, high=0.1)
NAMES = (
    SliceName(field="lang", value="de"),
    SliceName(field="lang", value="<script>alert(1)</script>"),
    SliceName(field="lang", value=None),
    SliceName(field="lang", value=None, folded=17),
)
METRIC = MetricReport(
    name="pattern",
    pattern="#### (<b>[0-9]+)",
    max_new_tokens=256,
    scores=SURE,
    not_judged=3,
    sources=(SourceGain(name="new", scores=SURE), SourceGain(name="old", scores=None)),
    slices=tuple(SliceGain(slice=name, scores=MAYBE) for name in NAMES),
)
CHANGE = ChangeReport(
    run_id="notes-before<i>",
    run_uri="s3://models/notes/runs/notes-before",
    finished="2025-01-30T04:05:06+00:00",
    loss=LossChange(examples=300, before=0.5, after=0.475, change=-0.025, low=-0.04, high=-0.01),
    scores=MAYBE,
)


def sliced(report):
    def slices(loss):
        return tuple(
            SliceLoss(slice=name, examples=75, tokens=750, loss=loss * (1 + n), plus_minus=0.0125 if n else None)
            for n, name in enumerate(NAMES)
        )

    judged = tuple(each.model_copy(update={"slices": slices(each.loss)}) for each in report.evaluations)
    return report.model_copy(update={"evaluations": judged, "metric": METRIC, "change": CHANGE})


def text_of(page):
    return " ".join(re.sub(r"<[^>]*>", " ", page.decode()).split())


def test_the_page_has_the_metric_with_its_paired_interval_by_source_and_by_slice():
    page = report_html(sliced(gsm8k()))
    text = text_of(page)

    assert "12.5% → 50.0% of 400, +37.5 points (95 % interval, paired: +32.8 to +42.0)." in text
    assert "3 more were answered and hold nothing to compare with." in text
    assert "match of the pattern, 400 answers 12% → 50%" in text
    assert "Answers by source" in text
    assert "de 40 10.0% 12.5% +2.5 -5.0 to +10.0" in text
    assert "17 other values" in text
    assert "old 0 - - - -" in text
    assert "Validation loss by lang" in text
    assert b"<script>alert" not in page
    assert b"<b>[0-9]" not in page


def test_the_page_says_what_has_changed_before_the_curves_and_what_may_be_chance():
    page = report_html(sliced(gsm8k()))
    text = text_of(page)

    assert page.index(b'id="change"') < page.index(b'id="curves"')
    assert "by -0.025 (95 % interval: -0.04 to -0.01)." in text
    assert "+2.5 points (95 % interval, paired: -5.0 to +10.0), which may be chance." in text
    assert b"notes-before<i>" not in page


def test_without_metric_slices_and_run_before_the_page_says_nothing_of_them():
    page = report_html(small())

    for anchor in (b'id="metric"', b'id="change"', b"Validation loss by"):
        assert anchor not in page


def test_an_answer_is_right_where_the_metric_says_so_and_shows_what_it_was_compared_with():
    report = sliced(gsm8k())
    first = report.answers[0].model_copy(
        update={"tuned": "so #### 72", "reference": "72-of-it", "base_score": 0.0, "tuned_score": 1.0}
    )
    page = report_html(report.model_copy(update={"answers": (first,)}))

    assert b'data-state="right"' in page
    assert "compared with 72-of-it" in text_of(page)
    assert "score 0 → 1" in text_of(page)
    assert "1 of 1 expected answers are right by the metric." in text_of(page)
    by_rouge = first.model_copy(update={"tuned_score": 0.5})
    assert b'data-state="wrong"' in report_html(report.model_copy(update={"answers": (by_rouge,)}))


def test_the_terminal_has_them_in_lines():
    lines = report_lines(sliced(gsm8k()))

    assert "pattern            base 12.5% -> tuned 50.0% of 400 held out" in lines
    assert "gain in answers    +37.5 points (95 %: +32.8 to +42.0)" in lines
    assert "                   lang de: +2.5 points (95 %: -5.0 to +10.0), n 40" in lines
    assert "run before         notes-before<i> on the same 300 examples" in lines
    assert "                   loss 0.5000 -> 0.4750, -0.0250 (95 %: -0.0400 to -0.0100)" in lines
    assert any(re.fullmatch(r"  lang 17 other values: loss [\d.]+ -> [\d.]+ \+- 0.013, n 75", line) for line in lines)
    assert not any("gain in answers" in line or "run before" in line for line in report_lines(small()))
