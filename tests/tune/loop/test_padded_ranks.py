"""A base that trains one document a row, in several processes: as in one, whatever rows are padded together on each."""

import pytest
import torch
from test_ranks import CLOSE, ranks  # noqa: F401 - a fixture
from tiny import write_copy, write_tokenizer
from tiny_families import config_of, write_family

from job.tune.engines.families import rows_of
from job.tune.model.config import empty_model


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("padded")
    base = write_family(folder / "base", "lfm2")
    return {
        "base": str(write_copy(folder / "copy", base, dtype=torch.float32)),
        "tokenizer": str(write_tokenizer(folder / "tokenizer", puts_bos=True)),
        "name": "lfm2",
    }


def test_a_step_in_padded_rows_on_two_processes_is_that_on_one(ranks):
    assert rows_of(empty_model(config_of("lfm2"))) == "padded"
    order = {"evaluate_every": 2, "targets": ("q_proj", "v_proj", "w1")}
    alone, together = ranks(1, **order)[0], [*ranks(2, **order).values()]

    assert [rank.result["error"] for rank in [alone, *together]] == [None] * 3
    first, other = together
    assert first.result["losses"] == pytest.approx(alone.result["losses"], rel=CLOSE)
    for one, theirs in zip(first.adapter, alone.adapter, strict=True):
        assert float((one - theirs).norm()) < 1e-4 * float(theirs.norm())
    assert other.result["losses"] == first.result["losses"]
    assert all(torch.equal(a, b) for a, b in zip(other.adapter, first.adapter, strict=True))
    assert first.result["evaluations"]["0"] == alone.result["evaluations"]["0"]
