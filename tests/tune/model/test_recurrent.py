"""Recurrent and convolutional layers: what they keep, which weights are read past their modules, what is left alone."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny import CPU
from tiny_families import FAMILIES, config_of, write_family
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from job.core.errors import UsageError
from job.core.plan.memory import AdapterShape, memory_parts
from job.core.recipe.schema import LoraSection
from job.tune.data.trial_documents import one_row
from job.tune.engines.families import layers_across
from job.tune.engines.packed_model import PackedModel
from job.tune.model.adapter import attach_lora, chosen_by_all_linear, refuse_targets
from job.tune.model.base import load_base
from job.tune.model.config import empty_model, shape_of
from job.tune.model.four_bit import left_whole
from job.tune.model.recurrent import _arguments, mixers_of, read_past_modules, recurrent_shape

RECURRENT = [name for name in FAMILIES if [*mixers_of(empty_model(config_of(name)))]]
NAMED = (
    *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "granitemoehybrid", "lfm2", "lfm2_moe", "lfm3"),
    *("falcon_h1", "nemotron_h", "jamba", "bamba", "zamba2"),
)
"""Those that people tune."""
_LORA = LoraSection(r=4)


def test_every_hybrid_that_people_tune_is_known_as_one():
    assert {*NAMED} <= {*RECURRENT}
    assert all(layers_across(empty_model(config_of(name))) for name in RECURRENT)
    for name in {*FAMILIES} - {*RECURRENT}:
        assert shape_of(config_of(name)).recurrent is None, name


def saved_bytes(module: nn.Module, hidden: int, tokens: int) -> int:
    """What autograd keeps of a real forward in bf16, without weights and without what came in.

    With what goes into linear modules, which an adapter's gradient takes as that of a weight does.
    """
    past = {*read_past_modules(module)}
    for name, each in module.named_modules():
        if isinstance(each, nn.Linear) and f".{name}" not in past:
            each.weight.requires_grad_(requires_grad=True)
    x = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    known = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers(), x)}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    here = {"position_ids": torch.arange(tokens)[None]}
    arguments = {name: here.get(name, value) for name, value in _arguments(module, tokens).items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = module(x, **arguments)
    assert result is not None  # alive, and all that it keeps
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("name", RECURRENT)
def test_what_is_planned_for_is_what_autograd_saves(name):
    """On the CPU, between the same two lengths; Falcon-H1 holds a product that it does not save."""
    config = config_of(name)
    shape = recurrent_shape(empty_model(config), config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False).eval()
    mixers = [module for _, module in mixers_of(model)]
    assert shape.layers == len(mixers)
    few = 2 * int(getattr(mixers[0], "chunk_size", None) or 64)
    saved = saved_bytes(mixers[0], config.hidden_size, 2 * few) - saved_bytes(mixers[0], config.hidden_size, few)
    assert shape.kept == pytest.approx(saved / few, rel=0.06)
    assert shape.kept >= saved // few
    assert shape.backward > 0
    assert shape.moved > shape.kept


def test_measuring_leaves_the_model_as_it_was():
    config = config_of("granitemoehybrid")
    model = empty_model(config)
    before = {name: (each.dtype, each.requires_grad, each.device) for name, each in model.named_parameters()}
    recurrent_shape(model, config)
    after = {name: (each.dtype, each.requires_grad, each.device) for name, each in model.named_parameters()}
    assert before == after


def test_a_module_that_wants_what_nobody_knows_is_planned_for_all_the_same():
    class LightningAttention(nn.Module):
        def forward(self, hidden, what_nobody_knows):
            return hidden

    model = nn.Sequential(LightningAttention())
    shape = recurrent_shape(model, SimpleNamespace(hidden_size=64))
    granite = config_of("granitemoehybrid")
    assert shape.kept > recurrent_shape(empty_model(granite), granite).kept


def test_the_plan_of_a_hybrid_is_larger_by_what_its_layers_keep():
    """Qwen3.5-9B's shape: 8.5 MB a token, beside 5.4 of what is as in any layer."""
    config = CONFIG_MAPPING["qwen3_5_text"]()
    shape = shape_of(config)
    assert (shape.layers, shape.recurrent.layers) == (32, 24)
    adapter = AdapterShape(parameters=20_000_000, rank=16, optimizer="adamw_8bit")
    parts = memory_parts(shape, adapter, "generic", compiled=False)
    assert parts.token_layer * 32 - 24 * shape.recurrent.kept == pytest.approx(5.4e6, rel=0.02)
    assert parts.token_largest - parts.token_layer == pytest.approx(shape.recurrent.kept / 4, abs=2)
    assert shape.recurrent.kept == pytest.approx(353e3, rel=0.01)


# --- weights that are read past their modules -------------------------------------------------------------------------

_READ = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape))")
_FUSED = re.compile(r"\n( +)if self\.training and cache_params is None:\n(?:\1 .*\n|\n)+")
"""What fused kernels do in training mode, which is left."""


def reads_of(module: nn.Module) -> tuple[set[str], set[str]]:
    """Linear modules whose weights a module's forward reads itself: in fused kernels in training, and elsewhere."""
    linear = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
    source = inspect.getsource(type(module).forward)
    outside = _FUSED.sub("\n", source)
    every, plain = ({*_READ.findall(text)} & linear for text in (source, outside))
    return every - plain, plain


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_reads_a_weight_past_its_module_but_those_that_are_known(name):
    """Packed numbers would be multiplied as weights, and an adapter passed over, without a word."""
    model = empty_model(config_of(name))
    mixers, known = {id(module) for _, module in mixers_of(model)}, {*read_past_modules(model)}
    found = set()
    for path, module in model.named_modules():
        in_training, elsewhere = reads_of(module)
        assert not in_training or id(module) in mixers, path
        found |= {f"{path}.{child}" for child in elsewhere}
    if name == "bloom":  # in a mode that was for its own pretraining
        assert not config_of(name).slow_but_exact
        assert {each.rpartition(".")[2] for each in found} == {"dense", "dense_4h_to_h"}
    else:
        assert found == known


@pytest.mark.parametrize("name", ["granitemoehybrid", "bamba", "falcon_h1", "nemotron_h", "zamba2", "mamba", "mamba2"])
def test_fused_kernels_that_read_packed_weights_are_never_entered(name, tmp_path, monkeypatch):
    base = load_base(write_family(tmp_path, name), device=CPU, dtype=torch.float32)
    model = PackedModel(attach_lora(base, _LORA, source="tiny", revision=None, seed=0))
    code = inspect.getmodule(type(next(mixers_of(base))[1]))

    def fused(*_arguments, **_options):
        raise AssertionError("a fused kernel was given the weight of the output projection")

    kernels = [each for each in ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn") if hasattr(code, each)]
    assert kernels
    for each in kernels:
        monkeypatch.setattr(code, each, fused)
    row = one_row([torch.arange(3, 20)])
    base.train()
    with pytest.raises(AssertionError, match="was given the weight"):
        model(row)
    model.train()
    assert all(layer.training for layer in model.modules() if isinstance(layer, LoraLayer))
    model(row)
    model.eval()
    model(row)


@pytest.mark.parametrize("name", ["jamba", "mamba", "falcon_mamba"])
def test_time_steps_stay_in_16_bits_and_get_no_adapter(name, tmp_path):
    config = config_of(name)
    base = load_base(write_family(tmp_path, name), device=CPU, dtype=torch.float32)
    past = read_past_modules(base)
    assert past
    assert {*past} <= {*left_whole(base)}
    assert shape_of(config).linear_parameters == sum(
        module.in_features * module.out_features for module in base.modules() if hasattr(module, "compute_dtype")
    )
    assert "dt_proj" not in chosen_by_all_linear(base)
    with pytest.raises(UsageError, match=r"lora\.targets: dt_proj: .* multiplies its weight past the module"):
        refuse_targets(config, LoraSection(targets=("in_proj", "dt_proj")))


@pytest.mark.parametrize("name", RECURRENT)
def test_no_convolution_gets_an_adapter(name):
    base = empty_model(config_of(name))
    model = attach_lora(base, _LORA, source="tiny", revision=None, seed=0)
    adapted = [module.base_layer for module in model.modules() if isinstance(module, LoraLayer)]
    assert adapted
    assert not [module for module in adapted if isinstance(module, nn.Conv1d)]
    in_mixers = {name for mixer, _ in mixers_of(base) for name, _ in base.get_submodule(mixer).named_modules()}
    assert any("lora_A" in name for name in in_mixers)  # their own linear modules do


def test_a_base_s_own_adapters_get_none():
    chosen = chosen_by_all_linear(empty_model(config_of("zamba2")))
    assert {"in_proj", "out_proj", "q_proj", "gate_up_proj"} <= {*chosen}
    assert not [name for name in chosen if name.isdigit()]
