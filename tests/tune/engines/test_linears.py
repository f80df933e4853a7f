"""Fused linear layers: the losses and gradients of PEFT's own, the formula under dropout, and what PEFT saves."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ARCHITECTURES, EVERY_LINEAR, adapted, backward, load_base, micro_batch, targets_of
from tiny_families import config_of

from job.core.recipe.schema import LoraSection
from job.kernels import reference
from job.kernels.linear_op import linear
from job.kernels.ops import Gate
from job.kernels.weights import Quantised
from job.tune.engines.families import linear_of
from job.tune.engines.packed_model import PackedModel
from job.tune.model.adapter import trainable
from job.tune.model.config import empty_model
from job.tune.model.mixtures import experts_modules, gate_of

SEVERAL = {"llama": EVERY_LINEAR, "mistral": EVERY_LINEAR, "qwen3": EVERY_LINEAR, "gemma2": EVERY_LINEAR}


def model_of(bases, architecture="llama", *, dropout=0.0, dtype=torch.float32):
    targets = SEVERAL.get(architecture, targets_of(architecture))
    return adapted(
        bases[architecture], LoraSection(r=4, alpha=8, dropout=dropout, targets=targets), dtype=dtype, moved=True
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_are_peft_s_own(bases, documents, architecture):
    model, batch = model_of(bases, architecture), micro_batch(documents, range(len(documents)))
    with model.linears.as_peft_has_them():
        expected = backward(model, [batch])
    found = backward(model, [batch])

    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_nothing_of_the_base_or_of_peft_runs(bases, documents, monkeypatch):
    """Neither an adapter's own layers nor a base layer: each linear module is fused, the untargeted ones too."""
    model = adapted(bases["llama"], LoraSection(r=4, targets=("q_proj", "lm_head")), moved=True)
    for module in model.modules():
        if "lora" in type(module).__module__ or "bitsandbytes" in type(module).__module__:
            monkeypatch.setattr(type(module), "forward", None)

    assert all(gradient.any() for gradient in backward(model, [micro_batch(documents, [0])])[1].values())


def test_a_mask_comes_from_the_seed_and_each_micro_batch_has_its_own(bases, documents):
    model, batch = model_of(bases, dropout=0.3), micro_batch(documents, range(3))
    model.train()
    losses = []
    for seed in (1, 1, 2):
        model.seed_dropout(seed)
        losses.append(backward(model, [batch]))
    again = backward(model, [batch])  # whoever gives no new seed gets the same masks

    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(gradient, losses[1][1][name]) for name, gradient in losses[0][1].items())
    assert losses[0][0] != losses[2][0] == again[0]
    model.eval()
    assert backward(model, [batch])[0] == backward(model, [batch])[0]


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_under_dropout_it_is_the_formula_with_the_mask_that_was_drawn(bases, rate):
    """y = x W^T + s (m * x / (1 - p)) A^T B^T and its gradients, by autograd in fp64 with that mask m."""
    model = model_of(bases, dropout=rate)
    of = linear_of(model.model.get_base_model().model.layers[0].mlp.down_proj)
    seed = torch.tensor([7])
    x = torch.randn(400, of.width, requires_grad=True)
    found = linear(x, of, seed)
    grad = torch.randn_like(found)
    found_gradients = torch.autograd.grad(found, [x, of.adapter.a, of.adapter.b], grad)

    mask = mask_of(of, x, seed)
    kept = float(mask.mean())
    assert kept == pytest.approx(1 - rate, abs=4 * (rate * (1 - rate) / mask.numel()) ** 0.5)
    weight = torch.empty(of.height, of.width)
    reference.dequantise(of.weight, weight)
    inputs = [each.detach().double().requires_grad_() for each in (x, of.adapter.a, of.adapter.b)]
    exact, a, b = inputs
    expected = exact @ weight.double().t() + of.adapter.scaling * (mask * exact / (1 - rate)) @ a.t() @ b.t()
    expected_gradients = torch.autograd.grad(expected, inputs, grad.double())
    for one, other in zip((found, *found_gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))


def mask_of(of, x, seed):
    """Which elements of x the op's adapter sees: [T, K] of 0 and 1, asked of the op an input column at a time."""
    seen = []
    for column in range(of.width):
        one = torch.zeros_like(x)
        one[:, column] = 1.0
        adapter = replace(of.adapter, a=torch.ones_like(of.adapter.a), b=torch.ones_like(of.adapter.b))
        thin = linear(one, replace(of, adapter=adapter), seed) - linear(one, replace(of, adapter=None), seed)
        seen.append(thin[:, 0].abs() > 1e-6)
    return torch.stack(seen, dim=1).double()


def test_without_the_adapter_it_is_the_base(bases, documents):
    model, batch = model_of(bases), micro_batch(documents, range(3))
    with model.model.disable_adapter():
        base = model(batch)
    for parameter in trainable(model):
        parameter.data.zero_()

    torch.testing.assert_close(model(batch), base)


def test_what_is_saved_is_what_peft_saves(bases, tmp_path):
    model = model_of(bases)
    model.model.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    with model.linears.as_peft_has_them():
        model.model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    ours, theirs = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("ours", "peft"))

    assert "adapter_model.safetensors" in ours
    assert ours == theirs


@pytest.mark.parametrize("kind", [{"lora_bias": True}, {"use_dora": True}, {"use_rslora": True}])
def test_an_adapter_of_another_kind_is_right_and_left_to_peft_where_it_must_be(bases, documents, kind):
    """A bias in B and DoRA are no part of the op; another scaling is."""
    base = load_base(bases["llama"], device=torch.device("cpu"), dtype=torch.float32)
    own = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **kind))
    torch.manual_seed(1)
    for parameter in trainable(own):
        parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.1
    module = own.get_base_model().model.layers[0].self_attn.q_proj
    model = PackedModel(own)
    found = backward(model, [micro_batch(documents, [0])])
    with model.linears.as_peft_has_them():
        expected = backward(model, [micro_batch(documents, [0])])

    assert hasattr(module, "fused") == ("use_rslora" in kind)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_that_are_kept_dequantised_change_no_bit(bases, documents, architecture, dtype):
    model, batch = model_of(bases, architecture, dtype=dtype), micro_batch(documents, range(3))
    packed = {module.fused for module in model.modules() if hasattr(module, "fused")}
    before = backward(model, [batch])
    model.linears.keep_dequantised(wanted=True)
    kept = {module.fused for module in model.modules() if hasattr(module, "fused")}
    with model.linears.as_peft_has_them():
        pass
    found = backward(model, [batch])
    model.linears.keep_dequantised(wanted=False)
    after = backward(model, [batch])

    assert any(isinstance(layer.weight, Quantised) for layer in packed)
    assert {layer.weight.dtype for layer in kept} == {dtype}
    for other in (found, after):
        assert other[0] == before[0]
        assert all(torch.equal(gradient, other[1][name]) for name, gradient in before[1].items())


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("qwen3_moe", Gate()),
        ("gpt_oss", Gate(interleaved=True, alpha=1.702, limit=7.0, one_more=True)),
        ("gemma4_text, experts", None),
        ("nemotron_h, experts", None),
    ],
)
def test_a_gate_is_one_kernel_where_it_is_found_to_be_the_module_s_own(name, gate):
    """Gemma 4's activation is another, and Nemotron-H's experts have no gate: theirs go through autograd."""
    module = next(module for _, module in experts_modules(empty_model(config_of(name))))
    found = gate_of(module)
    assert (found if isinstance(found, Gate) else None) == gate
    z = torch.randn(5, 64) * 8
    its_own = module._apply_gate(z) if module.has_gate else module.act_fn(z)
    torch.testing.assert_close(found(z), its_own, rtol=1e-5, atol=1e-5)
