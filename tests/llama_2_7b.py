"""Llama-2-7B, as the tests of memory, time and operations know it, and an epoch of GSM8K on it."""

import numpy as np

from job.core.plan.course import plan_course
from job.core.plan.forecast import Workload
from job.core.plan.memory import AdapterShape, ModelShape
from job.core.plan.shares import Shares

LLAMA_2_7B = ModelShape(
    layers=32,
    hidden=4096,
    intermediate=11008,
    vocabulary=32000,
    positions=4096,
    heads=32,
    key_heads=32,
    head_width=128,
    linear_parameters=6_476_005_376,
    whole_parameters=262_410_240,
)
LENGTHS = np.random.default_rng(0).integers(104, 304, 7000).astype(np.int32)  # GSM8K: 204 on average
WORK = Workload(
    shape=LLAMA_2_7B,
    adapter=AdapterShape(parameters=81_108_992, rank=32, optimizer="adamw_8bit"),
    engine="fast",
    compiled=False,
    course=plan_course(examples=7000, batch_size=256, steps=None, epochs=1.0, seed=0),
    lengths=LENGTHS,
    targets=int(LENGTHS.sum()),
    validation_tokens=100_000,
    evaluations=3,
    max_length=512,
    kept_checkpoints=3,
)


def one_step(tokens, longest=512):
    """What a plan is given of a run on one GPU whose steps have so many tokens, in documents of as many as may be."""
    whole, rest = divmod(tokens, longest)
    return Shares(lengths=((longest,) * whole + (rest,) * (rest > 0),), ranks=1, largest_step=tokens, all_seen=True)
