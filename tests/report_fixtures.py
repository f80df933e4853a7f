"""A finished run's report, as small as it can be."""

import pytest

from job.core.attempt.limits import Limits
from job.core.data.report_data import BadLine, DataObject, DataReport, Histogram, SideReport
from job.core.judging.held_out import Answer, ExactMatch
from job.core.reports.report import (
    AdapterFile,
    AdapterReport,
    AttemptReport,
    EvaluationReport,
    ModelReport,
    PlanReport,
    Report,
    StartReport,
    SweetSpot,
    Throughput,
    TrainingCurve,
)

SHA256 = "ab" * 32
COMMIT = "01c7f73d771dfac7d292323805ebc428287df4f9"


def side(uri, *, used):
    return SideReport(
        objects=(DataObject(uri=uri, etag='"1f"', version=None, size=1234, sha256=SHA256),),
        rows=used + 1,
        used=used,
        duplicates=2,
        truncated=0,
        dropped=1,
        without_target=0,
        tokens=40 * used,
        targets=10 * used,
        percentiles={"p50": 40, "p90": 44, "p95": 45, "p99": 46, "p100": 48},
        histogram=Histogram(edges=(32, 40, 48), counts=(used // 4, used - used // 4)),
    )


DATA = DataReport(
    train=side("s3://notes/train.jsonl", used=1000),
    validation=side("s3://notes/valid.jsonl", used=120),
    bad_lines=1,
    first_bad_lines=(BadLine(where="train.jsonl:17", reason='"text" is missing'),),
    overlap=0,
    max_length=64,
    max_length_reason="covers the longest example (48 tokens); no example is longer",
)
MODEL = ModelReport(
    base="owner/name",
    revision=COMMIT,
    licence="apache-2.0",
    architecture="LlamaForCausalLM",
    quantisation="NF4",
    trainable_parameters=1_000_000,
    total_parameters=7_000_000_000,
)
PLAN = PlanReport(
    micro_batch_tokens=4096,
    checkpointing=False,
    reason="there is room",
    steps=100,
    epochs=1.6,
    out_of_memory=0,
)


def evaluation(step, loss):
    return EvaluationReport(step=step, loss=loss, perplexity=2.7**loss, token_accuracy=0.5, tokens=1200)


LEARNED = {
    "curve": TrainingCurve(loss=(2.0, 1.0), grad_norm=(0.5, 0.4), learning_rate=(1e-4, 0.0)),
    "evaluations": (evaluation(0, 2.5), evaluation(50, 1.25), evaluation(100, 1.5)),
    "sweet_spot": SweetSpot(
        step=50,
        loss=1.25,
        best_step=50,
        best_loss=1.25,
        base_loss=2.5,
        reason="lowest validation loss",
        overfitting_from_step=100,
        stopped_early=False,
    ),
    "exact_match": ExactMatch(examples=60, base=0.0, tuned=0.95),
    "answers": tuple(
        Answer(prompt=f"question {n}\nAnswer:", expected=None, base="mumble", tuned=f"answer {n}") for n in range(8)
    ),
}
ADAPTER = AdapterReport(
    uri="s3://models/notes/runs/notes-1f2e/adapter",
    files={"adapter_model.safetensors": AdapterFile(size=4000, sha256=SHA256)},
    proven_loss=1.25,
    reported_loss=1.25,
)
THROUGHPUT = Throughput(
    tokens=64_000,
    seconds=16.0,
    tokens_per_second=4000.0,
    step_seconds_median=0.16,
    peak_memory_bytes=3 * 2**30,
    phase_seconds={"download": 1.0, "train": 16.0},
)
KILLED = AttemptReport(
    number=1,
    started="2025-01-31T04:00:00+00:00",
    ended=None,
    host="node-1",
    device=None,
    exit_code=None,
    reason="",
    from_step=None,
    last_committed_step=None,
)
FINISHED = AttemptReport(
    number=2,
    started="2025-01-31T04:01:00+00:00",
    ended="2025-01-31T04:05:06+00:00",
    host="node-2",
    device="NVIDIA H200",
    exit_code=0,
    reason="finished",
    from_step=50,
    last_committed_step=100,
)


@pytest.fixture
def report():
    return Report(
        run_id="notes-1f2e",
        run_uri="s3://models/notes/runs/notes-1f2e",
        fence=1,
        finished="2025-01-31T04:05:06+00:00",
        recipe={"train": {"steps": 100}},
        data=DATA,
        model=MODEL,
        plan=PLAN,
        **LEARNED,
        adapter=ADAPTER,
        throughput=THROUGHPUT,
        start=StartReport(seconds=21.5, spent={"start": 0.5, "other": 0.01, "load_model": 15.0, "first_step": 5.99}),
        stop=Limits(grace_seconds=30.0).figures(),
        resume_exact=True,
        notes=("the store has no conditional writes",),
        versions={"torch": "2.13.0"},
        device="NVIDIA H200",
        attempts=(KILLED, FINISHED),
    )
