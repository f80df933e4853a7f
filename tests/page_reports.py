"""Reports of all kinds for the page: usual ones, and those that are long, hostile or nearly empty."""

import numpy as np
from report_fixtures import ADAPTER, DATA, FINISHED, KILLED, LEARNED, MODEL, PLAN, THROUGHPUT

from job.core.attempt.limits import Limits
from job.core.data.lengths import candidates, length_statistics
from job.core.data.preview import ExamplePreview, PreviewPiece
from job.core.data.report_data import BadLine, Histogram, SourceReport
from job.core.judging.held_out import Answer, ExactMatch, held_out, tried
from job.core.judging.verdict import Evaluation, judge
from job.core.reports.report import (
    EvaluationReport,
    Report,
    SourceCurve,
    SourceLoss,
    SourceShare,
    StartReport,
    SweetSpot,
    TrainingCurve,
)


def small(**changes):
    """As the fixture `report`, with other values."""
    content = {
        "run_id": "notes-1f2e",
        "run_uri": "s3://models/notes/runs/notes-1f2e",
        "fence": 1,
        "finished": "2025-01-31T04:05:06+00:00",
        "recipe": {"train": {"steps": 100, "learning_rate": 2e-4}},
        "data": DATA,
        "model": MODEL,
        "plan": PLAN,
        **LEARNED,
        "adapter": ADAPTER,
        "throughput": THROUGHPUT,
        "start": StartReport(seconds=21.5, spent={"start": 0.5, "load_model": 15.0, "first_step": 6.0}),
        "stop": Limits(grace_seconds=30.0).figures(),
        "resume_exact": True,
        "notes": ("the store has no conditional writes",),
        "versions": {"torch": "2.13.0"},
        "device": "NVIDIA H200",
        "attempts": (KILLED, FINISHED),
    }
    return Report(**content | changes)


def judged(steps, *, examples=300, falls_until=0.6, wrong=(7, 40), seed=0, rises=None):
    """Evaluations every tenth of a run: they fall, and rise again; of some examples nothing is learned.

    With `rises` they rise from the first on, by so much of the loss in all.
    """
    draw = np.random.default_rng(seed)
    tokens = draw.integers(8, 60, examples)
    hard = draw.gamma(6.0, 0.2, examples)
    found = {}
    for tenth in range(11):
        part = tenth / 10
        learned = 0.35 + 0.65 * np.exp(-part / 0.25) + 0.25 * max(0.0, part - falls_until)
        if rises is not None:
            learned = 1 + rises * part
        losses = hard * learned * (1 + draw.normal(0, 0.03, examples))
        losses[[*wrong]] = hard[[*wrong]] * (1 + part)
        found[steps * tenth // 10] = Evaluation(
            step=steps * tenth // 10, nll=losses * tokens, tokens=tokens, correct=int(tokens.sum() * (1 - learned / 2))
        )
    return found


def gsm8k(*, steps=500, attempts=(FINISHED,), words=None, rises=None, **changes):
    """A run that learned, overfitted in the end, and has everything that a page shows."""
    evaluations = judged(steps, rises=rises)
    verdict = judge(evaluations)
    chosen, best = evaluations[verdict.sweet_spot_step], evaluations[verdict.best_step]
    draw = np.random.default_rng(1)
    at = np.arange(1, steps + 1)
    losses = 0.45 + 0.75 * np.exp(-at / (steps / 5)) + draw.normal(0, 0.08, steps)
    lengths = np.clip(draw.lognormal(5.0, 0.5, 7473), 20, 1400).astype(int)
    statistics = length_statistics(lengths)
    words = words or ("Natalia sold clips to 48 friends in April, and half as many in May. How many in all?", "#### 72")
    sides = {
        "train": DATA.train.model_copy(
            update={
                "rows": 7473,
                "used": 7473,
                "truncated": int((lengths > 256).sum()),
                "dropped": 0,
                "tokens": int(lengths.sum()),
                "percentiles": statistics.percentiles,
                "histogram": Histogram(edges=statistics.edges, counts=statistics.counts),
            }
        ),
        "validation": DATA.validation.model_copy(update={"rows": 300, "used": 300}),
    }
    data = DATA.model_copy(
        update=sides
        | {
            "max_length": 256,
            "max_length_reason": "set in the recipe",
            "candidates": tuple(
                candidates(lengths, chosen=256, positions=4096, targets=lambda n: int(np.minimum(lengths, n).sum()))
            ),
            "first_bad_lines": (BadLine(where="train.jsonl:17", reason='"answer" is missing'),),
            "preview": (preview(*words),),
        }
    )
    answers = tuple(
        Answer(
            prompt=f"Question: {words[0]} ({n})\nAnswer:",
            expected=words[1],
            base="I do not know.",
            tuned=words[1] if n % 4 else "#### 71",
            where=f"test.jsonl:{n + 1}",
            base_loss=1.25,
            tuned_loss=0.4 + n / 100,
        )
        for n in range(50)
    )
    content = {
        "data": data,
        "plan": PLAN.model_copy(update={"steps": steps, "epochs": 2.1}),
        "curve": TrainingCurve(
            loss=tuple(losses.tolist()),
            grad_norm=tuple(np.abs(draw.normal(0.6, 0.2, steps)).tolist()),
            learning_rate=tuple((2e-4 * (1 - at / steps)).tolist()),
        ),
        "evaluations": tuple(
            EvaluationReport(
                step=step,
                loss=e.loss,
                perplexity=e.perplexity,
                token_accuracy=e.token_accuracy,
                tokens=int(e.tokens.sum()),
            )
            for step, e in evaluations.items()
        ),
        "sweet_spot": SweetSpot(
            step=chosen.step,
            loss=chosen.loss,
            best_step=best.step,
            best_loss=best.loss,
            base_loss=evaluations[0].loss,
            reason="lowest validation loss",
            overfitting_from_step=verdict.overfitting_from_step,
            stopped_early=False,
        ),
        "held_out": held_out(evaluations, chosen=chosen.step, where=lambda i: f"test.jsonl:{i + 1}"),
        "tried": tried(evaluations, chosen=chosen.step, where=lambda i: f"test.jsonl:{i + 1}"),
        "exact_match": ExactMatch(examples=50, base=0.0, tuned=0.74),
        "answers": answers,
        "attempts": attempts,
    }
    return small(**content | changes)


def preview(prompt, answer):
    return ExamplePreview(
        where="train.jsonl:1",
        source="train",
        shown="first",
        tokens=40,
        learned=8,
        cut=0,
        left_out=None,
        pieces=(
            PreviewPiece(text="<s>", learned=False, control=True, ids=(1,)),
            PreviewPiece(text=f"Question: {prompt}\nAnswer:", learned=False, control=False, ids=(5, 6)),
            PreviewPiece(text=f" {answer}", learned=True, control=False, ids=(7,)),
            PreviewPiece(text="</s>", learned=True, control=True, ids=(2,)),
        ),
    )


def with_sources(plus_minus=0.125):
    """Two sources, one of which became worse."""
    names = ("new notes", "older notes")
    source = SourceReport(
        name="",
        rows=500,
        used=500,
        truncated=0,
        dropped=0,
        without_target=0,
        bad_lines=0,
        tokens=20_000,
        targets=5000,
        percentiles={"p50": 40, "p100": 48},
    )
    both = tuple(source.model_copy(update={"name": name}) for name in names)
    losses = {0: (2.5, 1.0), 50: (1.25, 1.4), 100: (1.5, 1.6)}
    evaluations = tuple(
        e.model_copy(
            update={
                "sources": tuple(
                    SourceLoss(name=name, examples=60, tokens=600, loss=loss, plus_minus=plus_minus)
                    for name, loss in zip(names, losses[e.step], strict=True)
                )
            }
        )
        for e in LEARNED["evaluations"]
    )
    return small(
        data=DATA.model_copy(
            update={
                "train": DATA.train.model_copy(update={"sources": both}),
                "validation": DATA.validation.model_copy(update={"sources": both}),
            }
        ),
        plan=PLAN.model_copy(
            update={"sources": tuple(SourceShare(name=name, examples=800, share=0.5, epochs=1.6) for name in names)}
        ),
        curve=LEARNED["curve"].model_copy(
            update={"sources": tuple(SourceCurve(name=name, loss=(2.0, 1.0)) for name in names)}
        ),
        evaluations=evaluations,
    )


def twenty_attempts():
    killed = [KILLED.model_copy(update={"number": n, "reason": "killed, or its node was lost"}) for n in range(1, 20)]
    return gsm8k(attempts=(*killed, FINISHED.model_copy(update={"number": 20})))


def several_gpus(**changes):
    speed = {
        "ranks": 8,
        "nodes": 2,
        "tokens_per_second_a_rank": 2500.0,
        "waited_seconds": 3.21,
        "bytes_a_step": 640_000_000,
    }
    return gsm8k(throughput=THROUGHPUT.model_copy(update=speed | changes))


KINDS = {
    "gsm8k": gsm8k,
    "several GPUs": several_gpus,
    "base kept": lambda: gsm8k(rises=0.02),
    "small": small,
    "50,000 steps": lambda: gsm8k(steps=50_000),
    "twenty attempts": twenty_attempts,
    "no prompts": lambda: gsm8k(answers=(), exact_match=None),
    "by an earlier version": lambda: small(held_out=None, start=None),
    "sources": with_sources,
    "Arabic": lambda: gsm8k(words=("كم عدد التفاحات إذا كان لديك ثلاث واشتريت أربعًا؟", "سبع تفاحات")),
    "Chinese": lambda: gsm8k(words=("小明有三个苹果。又买了四个。一共有几个。", "七个苹果")),
}
