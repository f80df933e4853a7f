"""A mixture's experts on a real GPU: one kernel dequantises them, grouped products multiply them; skipped elsewhere.

python -m pytest tests/gpu -s -rs
"""

import pytest
import torch
from test_handwritten_on_a_gpu import CUDA
from tiny import attach_lora, load_base
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from job.core.recipe.schema import LoraSection
from job.kernels import experts as grouped
from job.kernels import reference
from job.kernels.experts import Experts, ExpertsAdapter, ExpertsLinear, experts
from job.kernels.ops import Gate
from job.tune.engines.choice import choose_engine
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model
from job.tune.model.experts import in_four_bits
from job.tune.model.mixtures import gate_of

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

    return Experts(first=linear("gate_up_proj"), gate=gate_of(module), second=linear("down_proj"))


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


@pytest.mark.parametrize("gate", [Gate(), Gate(interleaved=True, alpha=1.702, limit=0.8, one_more=True)])
def test_rows_and_gates_are_those_of_the_reference(gate):
    from job.kernels import triton_elementwise as kernels

    torch.manual_seed(0)
    z, grad = torch.randn(700, 2 * 1440, device=CUDA), torch.randn(700, 1440, device=CUDA)
    rows, places = torch.randn(2800, 2880, device=CUDA), torch.randperm(2800, device=CUDA).view(700, 4)
    weights, ends = torch.rand(700, 4, device=CUDA), torch.tensor([0, 100, 101, 700], device=CUDA, dtype=torch.int32)
    outs = []
    for ops in (kernels, reference):
        found = [torch.empty(700, 1440, device=CUDA), torch.empty_like(z), torch.empty_like(grad)]
        found += [torch.empty(700, device=CUDA), torch.empty(700, 2880, device=CUDA)]
        found += [torch.empty(4, 1440, 16, device=CUDA), torch.empty(4, 16, 1440, device=CUDA)]
        ops.gate_forward(z, gate, found[0])
        ops.gate_backward(z, grad, weights[:, 0].contiguous(), gate, *found[1:4])
        ops.combine_rows(rows, places, weights, found[4])
        ops.sums_by_expert(grad.bfloat16(), z[:, :16].bfloat16().contiguous(), ends, found[5])
        ops.sums_by_expert(z[:, :16].bfloat16().contiguous(), grad.bfloat16(), ends, found[6])
        outs.append(found)
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_host_does_not_wait_for_experts(tmp_path):
    """Forward and backward, adapters on experts and all: what they get is never asked for."""
    of = layer_of(model_of(tmp_path / "base", "all-linear"))
    run(of, torch.bfloat16)  # kernels are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(of, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
