"""The generic engine on a real GPU: fused attention and linear layers, compiled layers; elsewhere these are skipped.

python -m pytest tests/gpu -s -rs
"""

import pytest
import torch
from test_handwritten_on_a_gpu import CUDA
from tiny import EVERY_LINEAR, attach_lora, config_of, cut_of, load_base, write_base
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

from job.core.recipe.schema import LoraSection
from job.kernels import attention_op, reference
from job.kernels import linear as layer
from job.kernels.attention_op import document_attention
from job.kernels.blocks import blocks_of
from job.tune.data.trial_documents import one_row
from job.tune.engines.attention_choice import AttentionChoice
from job.tune.engines.autograd import AutogradEngine
from job.tune.engines.decoder_inputs import decoder_inputs
from job.tune.engines.families import linear_of
from job.tune.engines.layers import variants_compiled
from job.tune.engines.packed_model import PackedModel
from job.tune.model.adapter import trainable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA")

LENGTHS = (300, 1, 77, 640, 0, 6)
"""Tokens of documents; one is the padding of a full micro-batch, which is empty."""
ROUNDING = 2.0**-8


def off(found, expected):
    """Difference as a share of the expected norm."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


# --- attention -------------------------------------------------------------------------------------------------------


def attention_inputs(key_heads, width):
    torch.manual_seed(0)
    parts = [
        torch.randn(sum(LENGTHS), heads, width, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, key_heads, key_heads)
    ]
    lengths = torch.tensor(LENGTHS)
    return parts, torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().to(CUDA), lengths


def one_by_one(parts, window):
    outputs = []
    for part in zip(*(torch.split(part.float(), [each for each in LENGTHS if each]) for part in parts), strict=True):
        q, k, v = (each.transpose(0, 1)[None] for each in part)
        distance = torch.arange(q.shape[2], device=CUDA)[:, None] - torch.arange(q.shape[2], device=CUDA)
        mask = (distance >= 0) & (distance < (window or q.shape[2] + 1))
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("key_heads", "width"), [(8, 128), (2, 64), (4, 256)])
def test_attention_is_that_of_each_document_alone_and_the_same_bits_each_time(key_heads, width, own, window):
    """Heads that are too wide for our kernels are torch's also where ours are wanted."""
    parts, cu_seqlens, lengths = attention_inputs(key_heads, width)
    blocks = blocks_of(cu_seqlens, sum(LENGTHS)) if own else None
    expected = one_by_one(parts, window)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, parts, grad)
    runs = []
    for _ in range(3):
        found = document_attention(*parts, cu_seqlens, lengths, blocks, width**-0.5, window)[0]
        runs.append([found.detach(), *torch.autograd.grad(found, parts, grad.bfloat16())])

    for found, other in zip(runs[0], [expected, *wanted], strict=True):
        assert off(found, other) < 4 * ROUNDING
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_our_attention_passes_torch_s_opcheck():
    parts, cu_seqlens, lengths = attention_inputs(2, 64)
    limits = (cu_seqlens, lengths, blocks_of(cu_seqlens, sum(LENGTHS)), 0.125, None)
    opcheck(document_attention, (*parts, *limits))

    parts = [part.detach() for part in parts]
    out, *kept = document_attention(*parts, *limits)
    *places, scale, window = limits
    opcheck(attention_op._backward_op, (out, *parts, out, *kept, *places, None, scale, window))


# --- linear layers ---------------------------------------------------------------------------------------------------


def model_of(base, *, dropout=0.0, targets=EVERY_LINEAR, dtype=torch.bfloat16):
    lora = LoraSection(r=32, alpha=64, dropout=dropout, targets=targets)
    loaded = load_base(base, device=CUDA, dtype=dtype)
    model = PackedModel(attach_lora(loaded, lora, source="tiny", revision=None, seed=0))
    torch.manual_seed(1)
    for parameter in trainable(model):
        parameter.data.normal_(std=0.02)
    model.train()
    model.attention = AttentionChoice(own=dtype == torch.bfloat16, reason=None)
    return model


@pytest.mark.parametrize("seed", [None, 5])
def test_a_layer_agrees_with_itself_in_fp32(tmp_path, seed):
    model = model_of(write_base(tmp_path / "base", config_of("llama")), dropout=0.1)
    for module in (model.model.get_base_model().model.layers[0].mlp.down_proj, model.model.get_base_model().lm_head):
        of = linear_of(module)
        masks = layer.masks_of(of.adapter, None if seed is None else torch.tensor([seed], device=CUDA))
        x = torch.randn(200, of.width, device=CUDA)
        grad = torch.randn(200, of.height, device=CUDA)
        results = []
        for dtype in (torch.bfloat16, torch.float32):
            y, h = layer.forward(x.to(dtype), of, masks)
            results.append([y, *layer.backward(grad.to(dtype), x.to(dtype), h, of, masks, wants_x=True)])
        for found, expected in zip(*results, strict=True):
            assert off(found, expected) < 4 * ROUNDING


def test_weights_are_dequantised_to_the_bit_as_by_the_reference(tmp_path):
    from job.kernels import triton_elementwise as kernels

    model = model_of(write_base(tmp_path / "base", config_of("llama")))
    weight = linear_of(model.model.get_base_model().model.layers[0].self_attn.q_proj).weight
    found, expected = (torch.empty(weight.height, weight.width, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    kernels.dequantise(weight, found)
    reference.dequantise(weight, expected)

    assert torch.equal(found, expected)


# --- compiled layers -------------------------------------------------------------------------------------------------


def documents_of(tokens, *, seed, vocabulary, mean=200):
    """A micro-batch of `tokens` tokens, of documents as long as GSM8K's."""
    generator = torch.Generator().manual_seed(seed)
    lengths = []
    while (left := tokens - sum(lengths)) > 1:
        lengths.append(min(left, int(torch.randint(mean // 4, 2 * mean, (), generator=generator))))
    return one_row([torch.randint(0, vocabulary, (each,), generator=generator).to(CUDA) for each in lengths])


def done(engine, model, batch):
    for parameter in trainable(model):
        parameter.grad = None
    losses = engine.accumulate(batch, targets=batch.targets, seed=3)
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compiled(model):
    engine = AutogradEngine(model, torch.Tensor.backward, compiler="inductor")
    engine.adopt(cut_of(2048, compiled=True))
    return engine


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_are_as_near_to_fp32_as_others_and_compiled_once(tmp_path, architecture, checkpointing):
    torch._dynamo.reset()
    base = write_base(tmp_path / "base", config_of(architecture))
    adapter = {"dropout": 0.05, "targets": "all-linear" if architecture == "gpt_neox" else EVERY_LINEAR}
    model, exact_model = (model_of(base, dtype=dtype, **adapter) for dtype in (torch.bfloat16, torch.float32))
    batches = [documents_of(1000 + 37 * seed, seed=seed, vocabulary=300) for seed in range(6)]
    as_they_are = []
    for each in (model, exact_model):
        plain = AutogradEngine(each, torch.Tensor.backward)
        plain.adopt(cut_of(2048, recomputed_layers=2 * checkpointing))
        as_they_are.append([done(plain, each, batch) for batch in batches])
    before = variants_compiled()
    engine = compiled(model)
    engine.adopt(cut_of(2048, recomputed_layers=2 * checkpointing, compiled=True))
    found = [done(engine, model, batch) for batch in batches]

    assert engine.compiler_failure is None
    assert variants_compiled() - before == 2  # the first layer's input has no gradient
    for (losses, gradients), plain, exact in zip(found, *as_they_are, strict=True):
        assert off(losses, plain[0]) < 8 * ROUNDING
        for name, gradient in exact[1].items():  # rounded elsewhere, but no farther from fp32
            rounded = off(plain[1][name], gradient)
            assert off(gradients[name], gradient) < 1.5 * rounded + 8 * ROUNDING, name
    again = done(engine, model, batches[0])
    assert torch.equal(again[0], found[0][0])
    assert all(torch.equal(gradient, found[0][1][name]) for name, gradient in again[1].items())


def test_the_host_waits_for_nothing(tmp_path):
    torch._dynamo.reset()
    model = model_of(write_base(tmp_path / "base", config_of("llama")), dropout=0.05)
    engine, batch = compiled(model), documents_of(1000, seed=0, vocabulary=300)
    done(engine, model, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.accumulate(batch, targets=batch.targets, seed=4)
        decoder_inputs(batch, in_blocks=True, for_compiled_code=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
