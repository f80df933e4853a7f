"""What of its GPU an attempt used, as the report says it."""

from types import SimpleNamespace

import numpy as np
import pytest
from llama_2_7b import LENGTHS, LLAMA_2_7B, WORK
from report_fixtures import DATA

from job.core.data.lengths import Candidate
from job.stages.finishing import report as stage


@pytest.fixture
def said(monkeypatch):
    """The share of an attempt at Llama-2-7B, of so many tokens in each step and so many seconds."""
    monkeypatch.setattr(stage, "read_config", lambda _folder: None)
    monkeypatch.setattr(stage, "shape_of", lambda _config: LLAMA_2_7B)

    def ceiling(device, *, tokens, seconds, ranks=1):
        monkeypatch.setattr(stage, "device_name", lambda _device: device)
        recipe = SimpleNamespace(
            lora=SimpleNamespace(r=32, on_experts=False), train=SimpleNamespace(optimizer="adamw_8bit")
        )
        documents = SimpleNamespace(lengths=LENGTHS, targets=LENGTHS.astype(np.int64))
        inputs = SimpleNamespace(
            device=None, base=SimpleNamespace(folder=None), dataset=SimpleNamespace(train=documents)
        )
        facts = SimpleNamespace(
            step_seconds=seconds,
            tokens=tokens,
            course=WORK.course,
            trainable_parameters=WORK.adapter.parameters,
            progress=SimpleNamespace(ranks=ranks, tokens=10**12, seconds=1.0),  # of earlier attempts, who knows where
        )
        return stage._ceiling(recipe, inputs, facts)

    return ceiling


def test_an_attempt_s_own_steps_count_for_each_process_whatever_was_before(said):
    one = said("NVIDIA H200", tokens=42_712, seconds=[1.0, 1.0])
    two = said("NVIDIA H200", tokens=42_712, seconds=[0.5, 0.5], ranks=2)

    assert one == two
    assert one["ceiling_share"] == pytest.approx(0.855, rel=0.015)  # as benched, with the ceiling of that run
    assert (one["ceiling_tflops"], one["ceiling_from"]) == (685, "measured")


@pytest.mark.parametrize("device", ["CPU, 2 threads", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA T1000"])
def test_of_a_device_whose_pace_is_not_known_nothing_is_said(said, device):
    assert said(device, tokens=1000, seconds=[1.0]) == {}


def test_an_attempt_without_a_step_has_no_share(said):
    assert said("NVIDIA H200", tokens=0, seconds=[]) == {}


def candidates_of(monkeypatch, *, dropped=0):
    """Of a run at Llama-2-7B on 1,000 examples, all of it learned."""
    monkeypatch.setattr(stage, "read_config", lambda _folder: None)
    monkeypatch.setattr(stage, "shape_of", lambda _config: LLAMA_2_7B)
    lengths = np.array([100] * 900 + [2000] * 100, dtype=np.int64)
    encoded = SimpleNamespace(lengths=lengths, target_counts=lambda limit: np.minimum(lengths, limit))
    found = [Candidate(tokens=n, examples_over=0, share_cut=0.0) for n in (512, 1024, 2048)]
    data = DATA.model_copy(
        update={
            "max_length": 1024,
            "candidates": tuple(found),
            "train": DATA.train.model_copy(update={"dropped": dropped}),
        }
    )
    inputs = SimpleNamespace(
        base=SimpleNamespace(folder=None), dataset=SimpleNamespace(report=data, train=SimpleNamespace(encoded=encoded))
    )
    recipe = SimpleNamespace(
        lora=SimpleNamespace(r=32, on_experts=False), train=SimpleNamespace(optimizer="adamw_8bit")
    )
    facts = SimpleNamespace(trainable_parameters=WORK.adapter.parameters)
    return {each.tokens: each.work for each in stage._data(recipe, inputs, facts).candidates}


def test_each_max_length_has_the_work_that_it_takes_beside_the_chosen_one(monkeypatch):
    """In tokens 0.734, 1 and 1.508 (141,200, 192,400 and 290,000); attention takes more where examples are longer."""
    work = candidates_of(monkeypatch)

    assert work[1024] == 1
    assert work[512] == pytest.approx(0.734, rel=0.02)
    assert 1.507 < work[2048] < 1.6
    assert set(candidates_of(monkeypatch, dropped=1).values()) == {None}
