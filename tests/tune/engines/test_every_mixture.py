"""Experts of every mixture: in 4 bits as by bitsandbytes; adapters on them as PEFT trains and opens them."""

import json

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from test_all_families import CPU, accumulated, choice_for, micro_batch_of, plain_losses
from tiny_families import FAMILIES, config_of, write_family
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from job.core.errors import UsageError
from job.core.recipe.schema import LoraSection
from job.kernels import experts as grouped
from job.tune.engines import families
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import _gradient_difference, check_model
from job.tune.loop.checkpoint import adapter_to_publish
from job.tune.model.adapter import attach_lora, load_with_peft, parameter_counts, refuse_targets
from job.tune.model.base import load_base
from job.tune.model.config import empty_model, read_config, shape_of
from job.tune.model.experts import dequantised_experts, in_four_bits
from job.tune.model.four_bit import left_whole
from job.tune.model.mixtures import experts_modules, weights_of_experts

_LENGTHS = (9, 33, 40)
_ALL = LoraSection(r=4, alpha=8, targets=("all-linear", "experts"))
_SOME = ("mixtral", "qwen3_moe", "gpt_oss")
MIXTURES = [name for name in FAMILIES if next(experts_modules(empty_model(config_of(name))), None)]
each_mixture = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in _SOME else pytest.mark.families) for name in MIXTURES]
)


def model_of(folder, lora=_ALL, dtype=torch.float32):
    base = load_base(folder, device=CPU, dtype=dtype)
    return PackedModel(attach_lora(base, lora, source="tiny", revision=None, seed=0))


def published(model, folder):
    """The files that a run publishes."""
    model.model.save_pretrained(folder / "saved")
    adapter_to_publish(model.model, None).write(folder / "saved" / "adapter_model.safetensors", folder / "adapter")
    return folder / "adapter"


def by_anybody(folder, adapter, ours):
    """Base by transformers and bitsandbytes, its experts with the values that ours stand for; the adapter by PEFT."""
    form = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=left_whole(ours.model.get_base_model()),
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", device_map={"": "cpu"}, quantization_config=form
    )
    held = dict(load_base(folder, device=CPU, dtype=torch.float32).named_modules())
    for path, module in experts_modules(base):
        for kind in weights_of_experts(module):
            getattr(module, kind).data = dequantised_experts(held[path], kind, dtype=torch.float32)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(base.requires_grad_(False), adapter, is_trainable=True).eval()


@each_mixture
def test_each_expert_is_what_bitsandbytes_makes_of_its_matrix(name, tmp_path):
    folder = write_family(tmp_path / "base", name)
    base = load_base(folder, device=CPU, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = dict(experts_modules(whole))
    assert modules
    assert {path for path, module in base.named_modules() if in_four_bits(module)} == set(modules)
    for path, module in modules.items():
        held = in_four_bits(base.get_submodule(path))
        assert tuple(held) == weights_of_experts(module)
        for kind, weights in held.items():
            in_16_bits = getattr(module, kind).detach()
            values = dequantised_experts(base.get_submodule(path), kind, dtype=torch.float32)
            assert values.shape == in_16_bits.shape
            assert base.get_submodule(path).get_parameter(kind).shape == in_16_bits.shape
            for expert, matrix in enumerate(in_16_bits):
                rows = matrix.t().contiguous() if module.is_transposed else matrix
                packed, state = bnb.functional.quantize_4bit(
                    rows, blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                assert torch.equal(weights.packed[expert], packed.reshape(-1))
                assert torch.equal(weights.scales[expert], state.absmax)
                assert torch.equal(weights.outer_scales[expert], state.state2.absmax)
                assert torch.equal(weights.offsets[expert], state.offset)
                theirs = bnb.functional.dequantize_4bit(packed, state)
                assert torch.equal(values[expert].t() if module.is_transposed else values[expert], theirs)


@each_mixture
def test_experts_train_as_plain_peft_trains_them(name, tmp_path):
    """From the published files, so that names, layout and scale are those that PEFT itself reads."""
    folder = write_family(tmp_path / "base", name)
    model = model_of(folder)
    assert parameter_counts(model.model)[0] == refuse_targets(read_config(folder), _ALL)
    check_model(model)
    choice = choice_for(model)
    documents = [torch.randint(3, read_config(folder).vocab_size, (length,)) for length in _LENGTHS]
    ours, our_gradients = accumulated(choice, model, documents)
    theirs = by_anybody(folder, published(model, tmp_path), model)
    torch.testing.assert_close(ours, plain_losses(theirs, documents), rtol=1e-4, atol=1e-4)
    on_experts = 0
    for parameter_name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            off = our_gradients[f"model.{parameter_name}"] - parameter.grad
            assert float(off.norm() / parameter.grad.norm()) < 1e-3, parameter_name
            on_experts += ".experts." in parameter_name
    assert on_experts == 4 * len(dict(experts_modules(empty_model(read_config(folder)))))


@each_mixture
def test_a_load_balancing_loss_that_the_config_asks_for_is_not_added_and_that_is_said(name, tmp_path):
    folder = write_family(tmp_path / "base", name)
    documents = [torch.randint(3, read_config(folder).vocab_size, (length,)) for length in _LENGTHS]
    found = []
    for wanted in ({}, {"output_router_logits": True, "router_aux_loss_coef": 1e3}):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | wanted))
        model = model_of(folder)
        assert all(getattr(model.model.get_base_model().config, key) == value for key, value in wanted.items())
        check_model(model)
        losses, gradients = accumulated(choice_for(model), model, documents)
        found.append((losses, {key: gradient.clone() for key, gradient in gradients.items()}))
    (losses, gradients), (with_it, others) = found
    assert torch.equal(with_it, losses)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(others[key], gradient) for key, gradient in gradients.items())
    said = [word for word in families.words_on(read_config(folder)) if "no load-balancing loss is added" in word]
    assert len(said) == 1


def test_recomputing_layers_changes_no_gradient_of_experts(tmp_path):
    model = model_of(write_family(tmp_path / "base", "qwen3_moe"))
    choice = choice_for(model)
    documents = [torch.randint(3, 300, (length,)) for length in _LENGTHS]
    losses, gradients = accumulated(choice, model, documents)
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    model.zero_grad()
    model.layers.recomputing = True
    again, gradients = accumulated(choice, model, documents)
    assert torch.equal(again, losses)
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients.items())


def test_what_is_published_names_the_parameters_of_experts(tmp_path):
    model = model_of(write_family(tmp_path / "base", "qwen3_moe"))
    config = json.loads((published(model, tmp_path) / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["lora_dropout"] == 0


def test_experts_alone_can_get_an_adapter(tmp_path):
    folder = write_family(tmp_path / "base", "mixtral")
    model = model_of(folder, LoraSection(r=2, targets="experts"))
    check_model(model)
    choice_for(model)
    experts = shape_of(read_config(folder)).experts
    assert parameter_counts(model.model)[0] == 2 * experts.sides == 2 * (2 * 4 * (64 + 256 + 128 + 64))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".experts." in name for name in names)
    assert len(names) == 2 * 4


def test_a_published_adapter_on_experts_is_loaded_onto_a_base_in_4_bits(tmp_path):
    """As the proof does: the loss is that of training to the bit."""
    folder = write_family(tmp_path / "base", "gpt_oss")
    model = model_of(folder)
    choice = choice_for(model)
    documents = [torch.randint(3, 300, (length,)) for length in _LENGTHS]
    losses, _ = accumulated(choice, model, documents)
    base = load_base(folder, device=CPU, dtype=torch.float32)
    again = PackedModel(load_with_peft(base, published(model, tmp_path), None)).eval()
    with torch.no_grad():
        assert torch.equal(again(micro_batch_of(documents)), losses)


def test_a_mixture_whose_products_do_not_keep_documents_apart_trains_one_a_row(tmp_path, monkeypatch):
    """As on a device that adds up few rows in another order than many: never refused, never wrong."""
    folder = write_family(tmp_path / "base", "qwen3_moe")
    documents = [torch.randint(3, 300, (length,)) for length in _LENGTHS]
    apart = model_of(folder)
    check_model(apart)
    assert apart.is_packed
    expected, _ = accumulated(choice_for(apart), apart, documents)

    def by_count(x, matrix, **options):
        return real(x, matrix, **options).mul_(1 + 1e-6 * len(x))

    real = torch.mm
    monkeypatch.setattr(grouped.torch, "mm", by_count)
    model = model_of(folder)
    check_model(model)
    assert not model.is_packed
    monkeypatch.undo()
    choice = choice_for(model)
    assert "one document a row" in choice.reason
    losses, _ = accumulated(choice, model, documents)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_rounding_may_turn_a_gradient_twice_as_far_as_it_does(monkeypatch):
    """What a token that goes to another expert changes is no mistake; what is beyond that is one."""
    theirs, rounded = {"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([1.0, 0.3])}
    turned = {"a": torch.tensor([0.9, 0.45])}
    assert "points elsewhere" in _gradient_difference(turned, theirs)
    assert _gradient_difference(turned, theirs, rounded) is None
    assert "points elsewhere" in _gradient_difference({"a": torch.tensor([0.3, 0.95])}, theirs, rounded)


def test_the_length_of_a_kind_s_gradients_may_be_off_by_what_rounding_makes_of_it_and_never_by_a_wrong_scale():
    theirs = {f"layers.{n}.a": torch.tensor([1.0, 0.0]) for n in range(3)}

    def times(factor):
        return {name: factor * gradient for name, gradient in theirs.items()}

    assert "of all layers.a is 0.90 times" in _gradient_difference(times(0.9), theirs)
    assert _gradient_difference(times(0.9), theirs, times(1.07), jumps=True) is None
    assert "of all layers.a is 0.87 times" in _gradient_difference(times(0.87), theirs, times(1.04), jumps=True)
    for factor in (0.5, 2.0):
        assert "times as large" in _gradient_difference(times(factor), theirs, times(1.5), jumps=True)


def test_a_norm_may_differ_by_what_rounding_moves():
    """Of one adapter, and of all of a kind."""
    theirs, rounded = {"layers.0.a": torch.tensor([1.0, 0.0])}, {"layers.0.a": torch.tensor([1.0, 0.2])}
    longer = {"layers.0.a": torch.tensor([1.18, 0.0])}
    assert "1.18 times as large" in _gradient_difference(longer, theirs)
    assert _gradient_difference(longer, theirs, rounded, jumps=True) is None
    assert "1.18 times as large" in _gradient_difference(longer, theirs, rounded)  # where no token jumps
    assert "all layers.a is 1.10 times" in _gradient_difference({"layers.0.a": torch.tensor([1.1, 0.0])}, theirs)
    assert "times as large" in _gradient_difference(
        {"layers.0.a": torch.tensor([1.3, 0.0])}, theirs, rounded, jumps=True
    )


def test_without_the_adapter_experts_are_the_base_s(tmp_path):
    folder = write_family(tmp_path / "base", "qwen3_moe")
    model = model_of(folder)
    choice_for(model)
    ids = torch.arange(3, 40)[None]
    base = load_base(folder, device=CPU, dtype=torch.float32)
    with torch.no_grad(), model.generating() as own, own.disable_adapter():
        without = own(input_ids=ids, use_cache=False).logits
        assert any(in_four_bits(module) for module in base.modules())
        torch.testing.assert_close(without, base(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_a_base_without_experts_has_none_to_adapt(tmp_path):
    with pytest.raises(UsageError, match=r"LlamaForCausalLM has no experts that this job puts into 4 bits"):
        refuse_targets(config_of("llama"), _ALL)
