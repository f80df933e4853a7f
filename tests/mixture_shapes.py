"""Two mixtures that were measured, as the tests of memory and operations know them."""

from dataclasses import replace

from llama_2_7b import LLAMA_2_7B

from job.core.plan.memory import ExpertsShape

GPT_OSS_20B = replace(
    LLAMA_2_7B,
    layers=24,
    hidden=2880,
    intermediate=11520,
    vocabulary=201088,
    heads=64,
    key_heads=8,
    head_width=64,
    linear_parameters=637_009_920,
    whole_parameters=1_167_449_664,
    experts=ExpertsShape(
        parameters=19_110_297_600,
        sides=11_059_200,
        number=32,
        chosen=4,
        first=5760,
        inner=2880,
        largest=530_841_600,
        has_bias=True,
    ),
)
QWEN3_30B_A3B = replace(
    LLAMA_2_7B,
    layers=48,
    hidden=2048,
    intermediate=6144,
    vocabulary=151936,
    key_heads=4,
    linear_parameters=905_969_664,
    whole_parameters=635_123_712,
    head_norms=True,
    experts=ExpertsShape(
        parameters=28_991_029_248,
        sides=39_321_600,
        number=128,
        chosen=8,
        first=1536,
        inner=768,
        largest=402_653_184,
    ),
)
