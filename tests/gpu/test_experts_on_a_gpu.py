"""A mixture's experts on a real GPU: one kernel dequantises them, grouped products multiply them; skipped elsewhere.

python -m pytest tests/gpu -s -rs
"""

import pytest
import torch
from test_handwritten_on_a_gpu import CUDA
from tiny import attach_lora, load_base
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from job.core.recipe import LoraSection
from job.kernels import experts as grouped
from job.kernels import reference
from job.kernels.experts import Experts, ExpertsAdapter, ExpertsLinear, experts
from job.tune.engines.choice import choose_engine
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model
from job.tune.model.experts import in_four_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA")

ROUNDING = 2.0**-8
TOKENS, CHOSEN = 700, 4


def model_of(folder, targets):
    """A mixture of sixteen experts, four layers deep, on the GPU in bf16."""
    config = CONFIG_MAPPING["qwen3_moe"](
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=192,
        num_experts=16,
        num_experts_per_tok=CHOSEN,
        initializer_range=0.06,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    base = load_base(folder, device=CUDA, dtype=torch.bfloat16)
    return PackedModel(attach_lora(base, LoraSection(r=4, targets=targets), source="tiny", revision=None, seed=0))


def layer_of(model):
    """Its first layer's experts with adapters that do something, and what to multiply with."""
    module = next(module for module in model.modules() if in_four_bits(module))
    torch.manual_seed(1)

    def linear(name):
        weights = in_four_bits(module)[name]
        a = torch.randn(len(weights) * 4, weights.width, device=CUDA) / 16
        b = torch.randn(weights.height, 4 * len(weights), device=CUDA) / 16
        adapter = ExpertsAdapter(a=a.requires_grad_(), b=b.requires_grad_(), scaling=2.0)
        return ExpertsLinear(weights=weights, bias=None, adapter=adapter)

    return Experts(first=linear("gate_up_proj"), gate=module._apply_gate, second=linear("down_proj"))


def run(of, dtype):
    torch.manual_seed(2)
    chosen = torch.rand(TOKENS, 15, device=CUDA).topk(CHOSEN).indices  # the sixteenth expert gets no token
    x = torch.randn(TOKENS, 256, device=CUDA).to(dtype).requires_grad_()
    weights = torch.rand(TOKENS, CHOSEN, device=CUDA).to(dtype).requires_grad_()
    out = experts(x, chosen, weights, of)
    factors = [f for each in (of.first, of.second) for f in (each.adapter.a, each.adapter.b)]
    towards = torch.randn(TOKENS, 256, device=CUDA).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, [x, weights, *factors], towards)]


def test_experts_are_dequantised_to_the_bit_as_by_the_reference(tmp_path):
    from job.kernels import triton_elementwise as kernels

    weights = layer_of(model_of(tmp_path / "base", "all-linear")).first.weights
    rows = torch.tensor([3, 0] * 8, dtype=torch.int32, device=CUDA)
    found, expected = (
        torch.zeros(16, weights.height, weights.width, device=CUDA, dtype=torch.bfloat16) for _ in range(2)
    )
    kernels.dequantise_experts(weights, rows, found)
    reference.dequantise_experts(weights, rows, expected)
    assert torch.equal(found, expected)
    assert not found[1].any()


def test_grouped_products_and_their_gradients_are_those_of_fp32_within_rounding(tmp_path):
    """In fp32 an expert is multiplied at a time, as on the CPU."""
    of = layer_of(model_of(tmp_path / "base", "all-linear"))
    for found, expected in zip(run(of, torch.bfloat16), run(of, torch.float32), strict=True):
        assert float((found.float() - expected).norm() / expected.norm()) < 16 * ROUNDING


def test_a_gradient_has_the_same_bits_each_time(tmp_path):
    of = layer_of(model_of(tmp_path / "base", "all-linear"))
    for first, second in zip(run(of, torch.bfloat16), run(of, torch.bfloat16), strict=True):
        assert torch.equal(first, second)


def test_nothing_dequantised_is_kept_for_the_backward(tmp_path):
    of = layer_of(model_of(tmp_path / "base", "all-linear"))
    run(of, torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    x = torch.randn(TOKENS, 256, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    chosen = torch.rand(TOKENS, 16, device=CUDA).topk(CHOSEN).indices
    out = experts(x, chosen, torch.rand(TOKENS, CHOSEN, device=CUDA, dtype=torch.bfloat16), of)
    kept = torch.cuda.memory_allocated() - before
    inner = 2 * TOKENS * CHOSEN * of.first.weights.height
    assert kept < 1.5 * inner + out.nbytes + x.nbytes + chosen.nbytes
    assert grouped._goes_in_groups(x)


@pytest.mark.parametrize("targets", ["all-linear", ("all-linear", "experts")])
def test_a_mixture_is_packed_and_trained_by_our_products(tmp_path, targets):
    model = model_of(tmp_path / "base", targets)
    check_model(model)
    assert model.is_packed  # documents are apart to the bit
    choice = choose_engine(model, "auto", backward=torch.autograd.backward)
    assert not choice.left_to_peft, choice.reason
    assert "how many tokens an expert gets" in choice.reason
