"""A mixture of experts in several processes: as in one, and sharded as replicated to the bit, with adapted experts."""

import pytest
import torch
from test_ranks import CLOSE, ranks  # noqa: F401 - a fixture
from test_sharded_ranks import equal
from tiny import write_copy, write_tokenizer
from tiny_families import config_of, write_family

from job.tune.model.config import shape_of

NF4_BYTES = 1 / 2 + 1 / 64
_TARGETS = ("q_proj", "v_proj", "experts")
_ASKED_FOR = [pytest.param(name, marks=pytest.mark.ranks) for name in ("mixtral", "gpt_oss")]


@pytest.fixture(scope="module", params=["qwen3_moe", *_ASKED_FOR])
def material(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("mixtures")
    base = write_family(folder / "base", request.param, layers=5)
    return {
        "base": str(write_copy(folder / "copy", base, dtype=torch.float32)),
        "tokenizer": str(write_tokenizer(folder / "tokenizer", puts_bos=True)),
        "name": request.param,
    }


def test_a_mixture_in_two_processes_is_that_in_one(ranks):
    alone = ranks(1, evaluate_every=2, targets=_TARGETS)[0]
    together = [*ranks(2, evaluate_every=2, targets=_TARGETS).values()]

    assert [rank.result["error"] for rank in [alone, *together]] == [None] * 3
    first, other = together
    assert first.result["losses"] == pytest.approx(alone.result["losses"], rel=CLOSE)
    for one, theirs in zip(first.adapter, alone.adapter, strict=True):
        # Adam divides by the gradient's own size, which is near zero for experts that few tokens go to.
        assert float((one - theirs).norm()) < 1e-4 * float(theirs.norm())
    assert other.result["losses"] == first.result["losses"]
    assert all(torch.equal(a, b) for a, b in zip(other.adapter, first.adapter, strict=True))
    assert first.result["evaluations"]["0"] == alone.result["evaluations"]["0"]


@pytest.mark.parametrize("layers", [0, 5], ids=["kept", "recomputed"])
def test_a_sharded_mixture_is_the_replicated_one_to_the_bit(ranks, layers):
    order = {"evaluate_every": 2, "ask": 3, "targets": _TARGETS, "layers": layers}
    replicated, sharded = ranks(2, **order), ranks(2, **order, sharded=True)

    assert replicated[0].result["error"] is None
    assert len(replicated[0].result["losses"]) == 4
    for rank in range(2):
        equal(sharded[rank], replicated[rank])


def test_each_rank_holds_its_part_of_the_experts_and_two_layers_of_them(ranks, material):
    """Experts are most of these bases: what stands in their place must not be counted, nor they be left whole."""
    held = [ranks(size, sharded=True, steps=1)[0].result["device_bytes"] for size in (2, 4)]
    experts = shape_of(config_of(material["name"], layers=5)).experts.parameters * NF4_BYTES

    assert held[0] - held[1] == pytest.approx(5 / 4 * held[1] / (5 / 4 + 2), rel=0.01)
    assert experts / 5 * (5 / 2 + 2) < held[0] < 2 * experts
