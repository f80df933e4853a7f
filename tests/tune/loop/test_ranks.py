"""Several processes make the steps that one would make: same losses, same weights, same evaluations, same ends."""

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from job_process import environment_without_job
from rank_program import SIZES
from safetensors.torch import load_file
from tiny import EVERY_LINEAR, config_of, write_base, write_tokenizer
from torch.distributed import TCPStore

PROGRAM = Path(__file__).parents[1] / "rank_program.py"
CLOSE = 2e-5
"""Relative: what another order of the sums of a few dozen numbers in fp32 makes of a loss."""


@dataclass
class Rank:
    code: int
    result: dict
    adapter: list


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return {
        "base": str(write_base(folder / "base", config_of("llama"))),
        "tokenizer": str(write_tokenizer(folder / "tokenizer", puts_bos=True)),
    }


@pytest.fixture
def ranks(tmp_path, material, warm):
    """Train in so many processes; `special`: what is done to one of them; `wait_for`: whose end is waited for."""

    def train(
        size,
        *,
        special=None,
        wait_for=None,
        steps=4,
        batch_size=8,
        optimizer="adamw_torch",
        tokens=64,
        layers=0,
        **order,
    ):
        folder = tmp_path / f"{size}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        options = {"steps": steps, "batch_size": batch_size, "optimizer": optimizer, "micro_batch_tokens": tokens}
        options["recomputed_layers"] = layers
        order = {**material, "folder": str(folder), "special": special or {}, "options": options, **order}
        (folder / "order.json").write_text(json.dumps(order))
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        environment = environment_without_job({"PYTHONPATH": os.pathsep.join([str(PROGRAM.parent)])})
        begun = []
        for rank in range(size):
            with (folder / f"{rank}.out").open("wb") as out:
                arguments = [str(rank), str(size), str(store.port), str(folder / "order.json")]
                child = warm.begin(
                    arguments,
                    environment=environment,
                    cwd=folder,
                    stdout=out,
                    stderr=out,
                    code=PROGRAM.read_text(),
                )
            begun.append(child)
        codes = {rank: begun[rank].wait() for rank in wait_for or range(size)}
        for child in begun:
            child.kill()
        ended = {}
        for rank, code in codes.items():
            place = folder / f"rank-{rank}"
            found = (place / "result.json").exists()
            assert found or code, (folder / f"{rank}.out").read_text()
            result = json.loads((place / "result.json").read_text()) if found else {}
            ended[rank] = Rank(code, result, [*load_file(place / "adapter.safetensors").values()] if found else [])
        return ended

    return train


def close(mine, theirs):
    for one, other in zip(mine.adapter, theirs.adapter, strict=True):
        assert other.any()
        # Adam divides by the gradient's own size: where that is near zero, rounding shows more than elsewhere.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_8bit"])
def test_one_two_and_four_processes_give_the_same_adapter_and_the_same_evaluations(ranks, optimizer):
    alone = ranks(1, evaluate_every=2, optimizer=optimizer)[0]
    assert alone.result["loaded_distributed"] is False
    assert len(alone.result["evaluations"]) == 3
    for size in (2, 4):
        ended = ranks(size, evaluate_every=2, optimizer=optimizer, special={"1": {"moved": True}})
        first = ended[0]
        assert [rank.result["error"] for rank in ended.values()] == [None] * size
        assert first.result["losses"] == pytest.approx(alone.result["losses"], rel=CLOSE)
        assert first.result["grad_norms"] == pytest.approx(alone.result["grad_norms"], rel=10 * CLOSE)
        if optimizer == "adamw_torch":  # eight bits of state round a difference in the last place to one of a percent
            close(first, alone)
        for other in ended.values():
            assert other.result["losses"] == first.result["losses"]
            assert all(torch.equal(a, b) for a, b in zip(other.adapter, first.adapter, strict=True))
        # Of the same weights, before the first step: the same passes, whoever makes them, to the bit.
        assert first.result["evaluations"]["0"] == alone.result["evaluations"]["0"]
        for step, (nll, _) in alone.result["evaluations"].items():
            assert first.result["evaluations"][step][0] == pytest.approx(nll, rel=1e-4)
        assert first.result["bytes"] > 0
        assert first.result["waited"] > 0


def test_the_same_processes_give_the_same_bits(ranks):
    one, two = (ranks(2, dropout=0.1)[0] for _ in range(2))

    assert one.result["losses"] == two.result["losses"]
    assert all(torch.equal(a, b) for a, b in zip(one.adapter, two.adapter, strict=True))


def test_ranks_draw_other_masks_of_dropout(ranks):
    ended = ranks(2, dropout=0.1, steps=2)
    first, second = (ended[rank].result["seeds"] for rank in (0, 1))

    assert len(set(first + second)) == len(first + second) >= 4


def test_more_ranks_than_examples_leave_some_without_work(ranks):
    alone = ranks(1, batch_size=2)[0]
    ended = ranks(3, batch_size=2)

    assert ended[0].result["losses"] == pytest.approx(alone.result["losses"], rel=CLOSE)
    close(ended[2], alone)


def test_memory_that_runs_out_on_one_rank_is_its_own_business_until_the_next_checkpoint(ranks):
    alone = ranks(1, checkpoint_every=2, tokens=300)[0]
    ended = ranks(2, checkpoint_every=2, tokens=300, special={"1": {"ceiling": 80}})

    assert ended[0].result["error"] is None
    assert ended[0].result["losses"] == pytest.approx(alone.result["losses"], rel=CLOSE)
    assert ended[0].result["tokens"] == ended[1].result["tokens"] == 75  # the run goes on alike everywhere
    close(ended[0], alone)


@pytest.mark.parametrize("engine", ["generic", "fast"])
def test_sums_are_made_piece_by_piece_to_the_same_bits(ranks, engine):
    """As soon as each is complete, whatever the pieces' size."""
    whole, pieces = (ranks(2, engine=engine, tokens=40, **more)[0] for more in ({}, {"piece": 300}))

    assert pieces.result["losses"] == whole.result["losses"]
    assert all(torch.equal(a, b) for a, b in zip(pieces.adapter, whole.adapter, strict=True))


def test_nodes_sum_by_themselves_before_they_sum_together(ranks):
    """Less crosses the network; adapters are the same everywhere, and nearly those of one node."""
    flat, nodes, again = (ranks(4, piece=300, **more) for more in ({}, {"nodes": 2}, {"nodes": 2}))

    assert nodes[0].result["losses"] == pytest.approx(flat[0].result["losses"], rel=CLOSE)
    for ended in (*nodes.values(), *again.values()):
        assert ended.result["losses"] == nodes[0].result["losses"]
        assert all(torch.equal(a, b) for a, b in zip(ended.adapter, nodes[0].adapter, strict=True))
    close(nodes[0], flat[0])


@pytest.mark.parametrize("tokens", [300, 90])
def test_memory_that_runs_out_while_gradients_are_summed_changes_no_sum(ranks, tokens):
    """In the backward of the last micro-batch, when the last layers' gradients are on their way."""
    order = {"tokens": tokens, "piece": 300, "targets": EVERY_LINEAR}
    alone = ranks(1, **order)[0]
    ended = ranks(2, special={"1": {"backward_ceiling": 60}}, **order)

    assert ended[1].result["tokens"] < tokens
    assert [rank.result["error"] for rank in ended.values()] == [None, None]
    for numbers in ("losses", "grad_norms"):
        assert ended[0].result[numbers] == pytest.approx(alone.result[numbers], rel=CLOSE)
    assert all(torch.equal(a, b) for a, b in zip(ended[0].adapter, ended[1].adapter, strict=True))


def test_what_is_not_finite_on_one_rank_ends_all_of_them_at_the_same_step(ranks):
    clean = ranks(2)[0]
    ended = ranks(2, special={"1": {"poison": 3}})

    assert {rank.result["error"] for rank in ended.values()} == {"DivergedError"}
    assert all("step 3" in rank.result["said"] for rank in ended.values())
    assert ended[0].result["losses"] == clean.result["losses"][:2]
    for one, other in zip(ended[0].adapter, ended[1].adapter, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


def test_a_step_that_rank_0_has_no_time_for_is_dropped_by_all(ranks):
    ended = ranks(2, special={"0": {"cut_after": 2}})

    assert {rank.result["error"] for rank in ended.values()} == {"StopRequestedError"}
    assert {rank.result["step"] for rank in ended.values()} == {2}
    assert ended[0].result["committed"][-1] == 2
    assert all(torch.equal(a, b) for a, b in zip(ended[0].adapter, ended[1].adapter, strict=True))


@pytest.mark.parametrize("lost", [1, 2])
def test_a_rank_that_dies_ends_the_others_with_the_last_whole_step_committed(ranks, lost):
    ended = ranks(3, special={str(lost): {"end": "exit", "at": 3}})

    assert ended.pop(lost).code == 9
    assert {rank.result["error"] for rank in ended.values()} == {"PeerLostError"}
    assert ended[0].result["step"] == 2
    assert ended[0].result["committed"] == [0, 2]


def test_rank_0_that_dies_ends_the_others(ranks):
    ended = ranks(3, special={"0": {"end": "exit", "at": 3}})

    assert ended.pop(0).code == 9
    assert {rank.result["error"] for rank in ended.values()} == {"PeerLostError"}


def test_a_rank_that_is_frozen_is_waited_for_no_longer_than_patience_allows(ranks):
    ended = ranks(2, special={"1": {"end": "freeze", "at": 3}}, wait_for=[0], patience=3.0)

    assert ended[0].result["error"] == "PeerSilentError"
    assert ended[0].result["committed"] == [0, 2]


def test_a_device_that_computed_something_else_is_found_before_anything_is_committed(ranks):
    """Its adapter was changed after the state had been shared."""
    ended = ranks(2, special={"1": {"end": "spoil", "at": 3}})

    assert ended[0].result["error"] == "SickDeviceError"
    assert "rank 1" in ended[0].result["said"]
    assert ended[0].result["committed"] == [0]


def test_the_material_is_uneven():
    assert len({p + c for p, c in SIZES}) > 5
