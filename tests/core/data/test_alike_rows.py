"""Rows that are padded together: every document once, of like lengths, never more padding than was planned for."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_2_7b import LLAMA_2_7B, one_step

from job.core.data.packing import MOST_PADDING, alike
from job.core.plan.cut import Cut, described, is_same_arithmetic, plan_memory
from job.core.plan.memory import GIB, AdapterShape, DeviceMemory, RecurrentShape, memory_parts

steady = settings(deadline=None, derandomize=True, database=None)
ADAPTER = AdapterShape(parameters=10_000_000, rank=16, optimizer="adamw_8bit")
RECURRENT = RecurrentShape(layers=24, kept=100_000, backward=300_000, moved=2_000_000)
CUT = Cut(
    engine="generic",
    micro_batch_tokens=1024,
    evaluation_tokens=1024,
    kept_layers=0,
    recomputed_layers=0,
    compiled=False,
    device="CPU",
    compute_dtype="bf16",
)


@steady
@given(st.lists(st.integers(1, 5000), max_size=80))
def test_each_document_has_a_row_and_padding_is_bounded(lengths):
    groups = alike(lengths)
    assert sorted(each for group in groups for each in group) == [*range(len(lengths))]
    for group in groups:
        assert lengths[group[0]] == max(lengths[each] for each in group)
        padded = len(group) * lengths[group[0]]
        assert padded <= (1 + MOST_PADDING) * sum(lengths[each] for each in group)


def test_equal_lengths_are_one_group_and_unlike_ones_are_not():
    assert alike([7] * 40) == [[*range(40)]]
    assert alike([100, 10]) == [[0], [1]]
    assert alike([]) == []


def test_the_groups_do_not_depend_on_anything_but_the_lengths():
    assert alike([90, 100, 95, 30]) == [[1, 2, 0], [3]]


def test_padding_is_planned_for():
    packed, padded = (memory_parts(LLAMA_2_7B, ADAPTER, "generic", rows=rows) for rows in ("packed", "padded"))
    assert padded.token_layer == math.ceil((1 + MOST_PADDING) * packed.token_layer)
    assert padded.token == math.ceil((1 + MOST_PADDING) * packed.token)
    assert padded.fixed == packed.fixed


@pytest.mark.parametrize("recomputed", [0, 32])
def test_what_recurrent_layers_keep_is_planned_for(recomputed):
    """All of them where nothing is recomputed; else one at a time, and its backward."""
    plain, hybrid = (
        memory_parts(replace(LLAMA_2_7B, recurrent=recurrent), ADAPTER, "generic", compiled=False)
        for recurrent in (replace(RECURRENT, kept=0, backward=0), RECURRENT)
    )
    tokens = 4096
    more = [
        parts.peak(layers=32, tokens=tokens, kept_layers=0, recomputed_layers=recomputed) for parts in (plain, hybrid)
    ]
    kept = RECURRENT.kept * (1 if recomputed else RECURRENT.layers)
    assert more[1] - more[0] == pytest.approx(tokens * (kept + RECURRENT.backward - plain.token), rel=0.02)


def test_a_plan_names_its_rows():
    device = DeviceMemory(kind="cuda", name="H100", free_bytes=79 * GIB)
    plan = plan_memory(
        LLAMA_2_7B, ADAPTER, engine="generic", rows="padded", device=device, max_length=512, shares=one_step(8192)
    )
    assert plan.cut.rows == "padded"
    assert described(plan.cut).endswith("one document a row, padded")


def test_other_rows_are_other_arithmetic():
    assert is_same_arithmetic(CUT, CUT)
    assert not is_same_arithmetic(CUT, replace(CUT, rows="padded"))
    assert not is_same_arithmetic(replace(CUT, rows="alone"), replace(CUT, rows="padded"))
