"""Each family that trains in packs computes the same to the bit on a base whose layers come one after the other."""

import pytest
import torch
from one_rank import OneRank
from test_all_families import _LORA, micro_batch_of
from tiny import CPU, gradients, trainable
from tiny_families import FAMILIES as TINY
from tiny_families import write_family

from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.families import FAMILIES, is_packed
from job.tune.engines.packed_model import PackedModel
from job.tune.model.adapter import attach_lora
from job.tune.model.base import load_base, quantised_files
from job.tune.model.config import empty_model, read_config
from job.tune.model.mixtures import experts_modules
from job.tune.model.sharded.layers import ShardedLayers, layers_of, reason_against_sharding

_OFTEN = ("gemma2", "gpt_neox", "phi3", "opt", "smollm3", "qwen3_moe", "mixtral", "gpt_oss")
_ON_EXPERTS = _LORA.model_copy(update={"targets": ("all-linear", "experts")})
_PACKED = [name for name, (model_type, _) in TINY.items() if model_type in FAMILIES]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _OFTEN else pytest.mark.families) for name in _PACKED]
)
def test_a_family_computes_the_same_on_a_sharded_base_to_the_bit(name, tmp_path):
    folder, copy = write_family(tmp_path / "base", name, layers=5), tmp_path / "copy"
    config = read_config(folder)
    model = empty_model(config)
    if not is_packed(model):
        assert "one document a row" in reason_against_sharding(model, packed=False)
        return
    assert reason_against_sharding(model, packed=True) is None
    assert len(layers_of(model)) == 5
    copy.mkdir()
    for file, content in quantised_files(load_base(folder, device=CPU, dtype=torch.float32), folder):
        (copy / file).write_bytes(content())
    torch.manual_seed(2)
    batch = micro_batch_of([torch.randint(3, config.vocab_size, (length,)) for length in (9, 33, 40)])
    lora = _ON_EXPERTS if next(experts_modules(model), None) else _LORA
    found = [results(copy, batch, lora, world) for world in (None, OneRank(lazy=True))]

    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def results(copy, batch, lora, world):
    """Losses and gradients, without and with recomputation, and the scores of an evaluation."""
    base = load_base(copy, device=CPU, dtype=torch.float32, on_host=world is not None)
    layers = None if world is None else ShardedLayers(base, world, CPU)
    model = PackedModel(attach_lora(base, lora, source="tiny", revision=None, seed=0), layers)
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    engine, found = AutogradEngine(model, torch.autograd.backward), []
    for recomputing in (False, True):
        model.layers.recomputing = recomputing
        losses = engine.accumulate(batch, targets=batch.targets, seed=0)
        found += [losses, *gradients(model).values()]
    return [*found, torch.tensor(model.score(batch).nll)]
