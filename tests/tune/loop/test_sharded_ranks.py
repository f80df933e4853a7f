"""A base that is sharded over the ranks gives what one gives that each of them holds, to the bit."""

import pytest
import torch
from test_ranks import ranks  # noqa: F401 - a fixture
from tiny import config_of, write_base, write_copy, write_tokenizer


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    config = config_of("llama")
    config.num_hidden_layers = 5
    write_base(folder / "base", config)
    return {
        "base": str(write_copy(folder / "copy", folder / "base", dtype=torch.float32)),
        "tokenizer": str(write_tokenizer(folder / "tokenizer", puts_bos=True)),
    }


def equal(one, other):
    for key in ("error", "losses", "grad_norms", "evaluations", "answers", "step", "committed"):
        assert one.result[key] == other.result[key], key
    assert all(torch.equal(a, b) for a, b in zip(one.adapter, other.adapter, strict=True))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("engine", ["generic", "fast"])
def test_losses_evaluations_and_answers_are_those_of_a_replicated_base_to_the_bit(ranks, engine, size):  # noqa: F811
    order = {"engine": engine, "evaluate_every": 2, "ask": 5, "dropout": 0.1}
    replicated, sharded = ranks(size, **order), ranks(size, **order, sharded=True)

    assert replicated[0].result["error"] is None
    assert len(replicated[0].result["losses"]) == 4
    assert len({*replicated[0].result["answers"]}) == 5
    for rank in range(size):
        equal(sharded[rank], replicated[rank])
        assert sharded[rank].result["device_bytes"]
        assert replicated[rank].result["device_bytes"] is None
    assert sharded[0].result["bytes"] > replicated[0].result["bytes"]
