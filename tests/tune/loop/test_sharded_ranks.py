"""A base that is sharded over the ranks gives what one gives that each of them holds, to the bit."""

import pytest
import torch
from layouts import bnb4_base
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
def test_losses_evaluations_and_answers_are_those_of_a_replicated_base_to_the_bit(ranks, engine, size):
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


SHARED = {
    "activations recomputed": (2, {"layers": 5}),
    "activations recomputed on the fast engine": (2, {"layers": 3, "engine": "fast"}),
    "weights that a cut says are kept": (2, {"cut": {"kept_layers": 5}}),
    "weights that a cut says are kept on the fast engine": (2, {"cut": {"kept_layers": 5}, "engine": "fast"}),
    "memory runs out on one rank": (2, {"tokens": 300, "checkpoint_every": 2, "special": {"1": {"ceiling": 80}}}),
    "memory runs out on rank 0 of the fast engine": (
        2,
        {"tokens": 300, "engine": "fast", "special": {"0": {"fast_ceiling": 80}}},
    ),
    "memory runs out in an evaluation": (
        2,
        {"evaluate_every": 2, "cut": {"evaluation_tokens": 300}, "special": {"1": {"evaluation_ceiling": 200}}},
    ),
    "ranks without work": (3, {"batch_size": 2}),
    "a step without time": (2, {"special": {"0": {"cut_after": 2}}}),
    "not finite on one rank": (2, {"special": {"1": {"poison": 3}}}),
}


@pytest.mark.parametrize("case", SHARED)
def test_what_happens_to_one_rank_happens_as_with_a_replicated_base_to_the_bit(ranks, case):
    size, order = SHARED[case]
    replicated, sharded = ranks(size, **order), ranks(size, **order, sharded=True)

    for rank in range(size):
        equal(sharded[rank], replicated[rank])
        assert sharded[rank].result["tokens"] == replicated[rank].result["tokens"]
        assert sharded[rank].result["setbacks"] == replicated[rank].result["setbacks"]
    if "memory" in case and "evaluation" not in case:
        assert sharded[0].result["tokens"] < 300
    assert (replicated[0].result["error"] is None) == (case not in {"a step without time", "not finite on one rank"})


def test_each_rank_holds_its_part_and_two_layers(ranks, material):
    held = [ranks(size, sharded=True, steps=1)[0].result["device_bytes"] for size in (2, 4)]

    assert held[0] - held[1] == pytest.approx(5 / 4 * held[1] / (5 / 4 + 2), rel=0.01)


def test_a_rank_that_dies_ends_the_others_with_the_last_whole_step_committed(ranks):
    ended = ranks(3, special={"1": {"end": "exit", "at": 3}}, sharded=True)

    assert ended.pop(1).code == 9
    assert {rank.result["error"] for rank in ended.values()} == {"PeerLostError"}
    assert ended[0].result["committed"] == [0, 2]


def test_a_rank_that_is_frozen_is_waited_for_no_longer_than_patience_allows(ranks):
    ended = ranks(2, special={"1": {"end": "freeze", "at": 3}}, wait_for=[0], patience=3.0, sharded=True)

    assert ended[0].result["error"] == "PeerSilentError"
    assert ended[0].result["committed"] == [0, 2]


def test_bytes_that_arrive_as_other_ones_are_found_before_the_first_step(ranks):
    """Layers are gathered from the last one on: the third gather is layer 2's, whose second half rank 1 has sent."""
    ended = ranks(2, special={"1": {"sick_link": 3}}, sharded=True)

    for rank in ended.values():
        assert rank.result["error"] == "SickDeviceError"
        assert "rank 1 has gathered other bytes of layer 2 than rank 1 has read" in rank.result["said"]


@pytest.mark.parametrize(
    "form",
    [
        {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp", "model.layers.2.self_attn.q_proj"]},
        {"bnb_4bit_use_double_quant": False},
        {"bnb_4bit_quant_type": "fp4"},
    ],
)
def test_layers_of_other_forms_and_of_two_sizes_are_the_same_to_the_bit(ranks, tmp_path, form):
    config = config_of("qwen2")  # with biases
    config.layer_types = ["full_attention"] * 5
    config.num_hidden_layers = 5
    plain = write_base(tmp_path / "plain", config)
    published = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | form
    base = str(bnb4_base(plain, tmp_path / "published", **published))
    replicated, sharded = ranks(2, base=base), ranks(2, base=base, sharded=True)

    for rank in range(2):
        equal(sharded[rank], replicated[rank])
