"""What trackers hear: the recipe flat, the figures by name, an id that is a run's and nobody else's."""

import posixpath
import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from page_reports import small

from job.core.judging.judged_answers import Gain, MetricReport
from job.core.judging.slices import SliceLoss, SliceName
from job.core.judging.verdict import Evaluation
from job.core.reports.report import SourceLoss
from job.core.reports.tracked import evaluation_numbers, tracked_figures, tracked_key, tracked_recipe

JUDGED = Evaluation(step=3, nll=np.array([1.0, 3.0]), tokens=np.array([2, 2]), correct=2)
SURE = Gain(examples=400, before=0.125, after=0.5, gain=0.375, low=0.3275, high=0.42)


def source(name):
    return SourceLoss(name=name, examples=2, tokens=4, loss=1.0)


def slice_of(value, field="lang"):
    return SliceLoss(slice=SliceName(field=field, value=value), examples=2, tokens=4, loss=2.0, plus_minus=None)


def test_a_recipe_is_flat_and_what_is_not_set_is_left_out():
    recipe = {
        "model": {"base": "owner/name", "revision": None},
        "lora": {"r": 8, "dropout": 0.0, "targets": ["q_proj", "v_proj"]},
        "store": {"checksums": True},
        "data": {"chat_template": "x" * 9000},
    }

    assert tracked_recipe(recipe) == {
        "model.base": "owner/name",
        "lora.r": 8,
        "lora.dropout": 0.0,
        "lora.targets": "q_proj, v_proj",
        "store.checksums": True,
        "data.chat_template": "x" * 500,
    }


def test_the_figures_are_the_report_s():
    figures = tracked_figures(small())

    assert figures["final/validation_loss"] == 1.25
    assert figures["final/validation_loss_base"] == 2.5
    assert figures["final/exact_match"] == 0.95
    assert "final/exact_match" not in tracked_figures(small(exact_match=None))


def test_a_metric_s_figures_have_its_name_and_its_interval():
    metric = MetricReport(name="pattern", pattern="([0-9]+)", max_new_tokens=64, scores=SURE)
    figures = tracked_figures(small(metric=metric))

    assert {name: value for name, value in figures.items() if "pattern" in name} == {
        "final/pattern_base": 0.125,
        "final/pattern": 0.5,
        "final/pattern_gain": 0.375,
        "final/pattern_gain_low": 0.3275,
        "final/pattern_gain_high": 0.42,
        "final/pattern_examples": 400,
    }
    assert figures["final/exact_match"] == 0.95
    few = SURE.model_copy(update={"low": None, "high": None})
    by_field = metric.model_copy(update={"name": "exact_match", "field": "final", "scores": few})
    figures = tracked_figures(small(metric=by_field))
    assert figures["final/exact_match"] == 0.95
    assert figures["final/exact_match_of_field"] == 0.5
    assert "final/exact_match_of_field_gain_low" not in figures


def test_an_evaluation_has_the_loss_of_each_source_and_each_slice():
    numbers = evaluation_numbers(JUDGED, [source("new"), source("openai/gsm8k")], [slice_of("de"), slice_of(None)])

    (none,) = (name for name in numbers if "none" in name)
    assert re.fullmatch("validation/loss_by_lang/_none_-[0-9a-f]{6}", none)
    assert numbers == {
        none: 2.0,
        "validation/loss": 1.0,
        "validation/token_accuracy": 0.5,
        "validation/loss/new": 1.0,
        "validation/loss/openai/gsm8k": 1.0,
        "validation/loss_by_lang/de": 2.0,
    }


@given(st.lists(st.text(min_size=1, max_size=300), min_size=2, max_size=6, unique=True))
def test_every_tracker_takes_the_names_and_no_two_are_one(texts):
    """What MLflow's client asks of a metric's name, and what TensorBoard's leaves as it is."""
    numbers = evaluation_numbers(JUDGED, [*map(source, texts)], [slice_of(text, field=texts[0]) for text in texts])

    assert len(numbers) == 2 + 2 * len(texts)
    for name in numbers:
        assert re.fullmatch(r"[-/\w.]+", name)
        assert posixpath.normpath(name) == name
        assert len(name) <= 250


def test_the_same_run_id_in_two_outputs_is_two_tracked_runs():
    here, there = tracked_key("ab-cd", "s3://a/runs/ab-cd"), tracked_key("ab-cd", "s3://b/runs/ab-cd")

    assert here != there
    assert here == tracked_key("ab-cd", "s3://a/runs/ab-cd")
    assert here.startswith("ab-cd-")
    assert len(tracked_key("x" * 64, "s3://a")) <= 128
