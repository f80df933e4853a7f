"""Llama-2-7B, as the tests of memory, time and operations know it."""

from job.core.memory import ModelShape

LLAMA_2_7B = ModelShape(
    layers=32,
    hidden=4096,
    intermediate=11008,
    vocabulary=32000,
    positions=4096,
    heads=32,
    key_heads=32,
    head_width=128,
)
