"""Verdicts, entries and results, as small as they can be."""

import numpy as np

from job.core.nightly.channel import AdapterFileInUse, AdapterInUse, Compared, OtherTraining
from job.core.nightly.exam_results import Exam, results_of
from job.core.nightly.judgement import Answered, Candidate, Standards, Terms, judge_run

HOW = "h" * 8
STANDARDS = Standards(min_improvement=0.0, max_drift=0.02)
TOKENS = 10


def adapter(run_id, letter="a"):
    files = {"adapter_model.safetensors": AdapterFileInUse(size=10, sha256=letter * 64)}
    return AdapterInUse(uri=f"s3://b/runs/{run_id}/adapter", files=files)


def exam(count=100, *, name="exam", cluster=None, slices=None):
    return Exam(name=name, tokens=(TOKENS,) * count, cluster=cluster, slices=slices or {})


def results(loss, *, model, count=100, noise=0.05, seed=1, on="exam", worse=None):
    """A model of this loss a token, with some noise of its own; `worse`: places that are worse by a nat."""
    rng = np.random.default_rng([seed, len(model)])
    own = rng.standard_normal(count)
    nll = (loss + noise * (own - own.mean())) * TOKENS
    if worse is not None:
        nll[list(worse)] += TOKENS
    return results_of(nll, model=model, exam=on, how=HOW)


def judged(
    run_id="run-2",
    *,
    gain=0.1,
    level=0.02,
    compared=None,
    number=1,
    fresh=None,
    exam_of=None,
    worse=None,
    regression=None,
    seeds=(),
    earlier=None,
    challenger=None,
    champion=None,
    checkpoints=1,
):
    """A verdict on a run that is better than run-1 by so much."""
    asked = exam_of or exam()
    return judge_run(
        Candidate(
            run_id=run_id,
            run_uri=f"s3://b/runs/{run_id}",
            round=number,
            adapter=adapter(run_id),
            base="owner/base",
            revision="c" * 40,
            others=tuple(OtherTraining(run_id=f"seed{each}", adapter=adapter(f"seed{each}")) for each in seeds),
            checkpoints=checkpoints,
        ),
        Answered(
            exam=asked,
            challenger=challenger or results(1.0 - gain, model=run_id, seed=2, worse=worse),
            champion=champion or results(1.0, model="run-1"),
            seeds=tuple(results(1.0 - each, model=f"seed{each}", seed=3) for each in seeds),
            earlier=earlier or {},
        ),
        regression,
        Terms(
            champion="run-1",
            compared=compared or Compared(run_id="run-1", sequence=1, etag="e1"),
            standards=STANDARDS,
            level=level,
            fresh=fresh,
            time="2026-11-29T02:17:00+00:00",
            day=740_000,
        ),
    )
