"""The two pictures are real pictures, whatever the report holds."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from job.core.attempt.limits import Limits
from job.core.data.report_data import DataReport, Histogram, SideReport
from job.core.reports.report import (
    AdapterReport,
    AttemptReport,
    EvaluationReport,
    ModelReport,
    PlanReport,
    Report,
    SweetSpot,
    Throughput,
    TrainingCurve,
)
from job.render.pictures import LENGTHS_PNG, LOSS_PNG, draw


def side(lengths):
    counts, edges = np.histogram(lengths, bins=range(min(lengths), max(lengths) + 20, max(1, (max(lengths) - 1) // 24)))
    return SideReport(
        objects=(),
        rows=len(lengths),
        used=len(lengths),
        duplicates=0,
        truncated=sum(n > 512 for n in lengths),
        dropped=0,
        without_target=0,
        tokens=sum(lengths),
        targets=sum(lengths),
        percentiles={"p50": int(np.median(lengths))},
        histogram=Histogram(edges=tuple(map(int, edges)), counts=tuple(map(int, counts))),
    )


def report(*, losses, evaluations, chosen, overfitting=None, lengths=(8, 9, 9, 10), max_length=32, base="tiny/base"):
    evaluated = tuple(
        EvaluationReport(step=step, loss=loss, perplexity=1.0, token_accuracy=0.5, tokens=9)
        for step, loss in evaluations.items()
    )
    spot = SweetSpot(
        step=chosen,
        loss=evaluations[chosen],
        best_step=chosen,
        best_loss=evaluations[chosen],
        base_loss=evaluated[0].loss,
        reason="lowest validation loss",
        overfitting_from_step=overfitting,
        stopped_early=False,
    )
    data = DataReport(
        train=side(list(lengths)),
        validation=side([9]),
        bad_lines=0,
        first_bad_lines=(),
        overlap=0,
        max_length=max_length,
        max_length_reason="",
    )
    model = {"revision": "0" * 40, "licence": None, "architecture": "Llama", "quantisation": "NF4"}
    plan = {"micro_batch_tokens": 4096, "checkpointing": False, "reason": "", "out_of_memory": 0}
    speed = {"tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0, "step_seconds_median": 1.0, "peak_memory_bytes": 1}
    attempt = {"ended": None, "host": "h", "device": None, "exit_code": 0, "reason": "", "from_step": 0}
    flat = tuple(0.0 for _ in losses)
    return Report(
        run_id="r1",
        run_uri="file:///store/runs/r1",
        fence=1,
        stop=Limits(grace_seconds=30.0).figures(),
        finished="now",
        recipe={},
        data=data,
        model=ModelReport(base=base, trainable_parameters=1, total_parameters=2, **model),
        plan=PlanReport(steps=len(losses), epochs=1.0, **plan),
        curve=TrainingCurve(loss=tuple(losses), grad_norm=flat, learning_rate=flat),
        evaluations=evaluated,
        sweet_spot=spot,
        exact_match=None,
        answers=(),
        adapter=AdapterReport(uri="u", files={}, proven_loss=1.0, reported_loss=1.0),
        throughput=Throughput(phase_seconds={}, **speed),
        resume_exact=True,
        notes=(),
        versions={},
        device="CPU",
        attempts=(AttemptReport(number=1, started="now", last_committed_step=None, **attempt),),
    )


def typical():
    """500 noisy steps that overfit in the end."""
    draw_from = np.random.default_rng(0)
    steps = np.arange(1, 501)
    losses = 0.9 + 1.9 * np.exp(-steps / 90) - steps / 1500 + draw_from.normal(0, 0.18, 500)
    evaluations = {int(s): float(1.05 + 1.75 * np.exp(-s / 80) + max(0, s - 300) / 900) for s in range(0, 501, 50)}
    lengths = np.clip(draw_from.lognormal(4.9, 0.5, 7473), 20, 900).astype(int).tolist()
    return report(
        losses=losses.tolist(),
        evaluations=evaluations,
        chosen=300,
        overfitting=400,
        lengths=lengths,
        max_length=512,
        base="meta-llama/Llama-2-7b-hf",
    )


CASES = {
    "overfitting": typical,
    "one evaluation": lambda: report(losses=[], evaluations={0: 4.8}, chosen=0),
    "one step": lambda: report(losses=[4.8], evaluations={0: 4.8, 1: 4.7}, chosen=1),
    "the base is best": lambda: report(losses=[4.8, 9.0], evaluations={0: 4.8, 2: 9.0}, chosen=0, overfitting=2),
    "one length": lambda: report(losses=[1.0], evaluations={0: 1.0, 1: 1.0}, chosen=0, lengths=[9, 9]),
    "a loss of zero": lambda: report(losses=[0.0, 0.0], evaluations={0: 0.0, 2: 0.0}, chosen=0),
    "a loss that explodes": lambda: report(losses=[2.0] * 50 + [1e30], evaluations={0: 2.0, 51: 1e30}, chosen=0),
    "a name that means something to matplotlib": lambda: report(
        losses=[1.0], evaluations={0: 1.0}, chosen=0, base="s3://bucket/$x_{/$^model"
    ),
    "a long name": lambda: report(losses=[1.0], evaluations={0: 1.0}, chosen=0, base="s3://bucket/" + "folder/" * 40),
}


@pytest.mark.parametrize("case", CASES)
def test_both_pictures_are_drawn(case):
    pictures = draw(CASES[case]())
    assert set(pictures) == {LENGTHS_PNG, LOSS_PNG}
    for content in pictures.values():
        assert content.startswith(b"\x89PNG")
        pixels = imread(io.BytesIO(content))[:, :, :3]
        assert pixels.shape == (600, 1080, 3)
        colours = (pixels * 255).astype(int) @ [1, 256, 65536]
        assert len(np.unique(colours)) > 20  # bars, lines and words


def is_near(pixels, colour):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.abs(pixels - wanted).max(axis=2) < 0.02


def test_overfitting_and_max_length_are_marked_by_a_line_from_top_to_bottom():
    red = "#b5172f"
    with_it, without = (
        typical(),
        typical().model_copy(
            update={"sweet_spot": typical().sweet_spot.model_copy(update={"overfitting_from_step": None})}
        ),
    )
    for content, expected in (
        (draw(with_it)[LOSS_PNG], True),
        (draw(without)[LOSS_PNG], False),
        (draw(with_it)[LENGTHS_PNG], True),
    ):
        marked = is_near(imread(io.BytesIO(content))[:, :, :3], red)
        assert (marked.sum(axis=0).max() > 150) == expected


def test_the_same_report_gives_the_same_picture():
    assert draw(typical()) == draw(typical())
