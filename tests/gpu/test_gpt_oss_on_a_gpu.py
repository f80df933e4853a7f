"""gpt-oss on a real GPU: attention with sinks by our kernels and torch's, MXFP4 decoded there; skipped elsewhere.

python -m pytest tests/gpu -s -rs
"""

import pytest
import torch
from test_handwritten_on_a_gpu import CUDA
from tiny import attach_lora, load_base
from tiny_mxfp4 import write_mxfp4
from torch.library import opcheck
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from job.core.plan.memory import GIB
from job.core.recipe.schema import LoraSection
from job.kernels import attention_op
from job.kernels.attention_op import document_attention
from job.kernels.blocks import blocks_of
from job.tune.engines.attention_choice import difference_from_formula
from job.tune.engines.choice import choose_engine
from job.tune.engines.packed_model import PackedModel
from job.tune.engines.selftest import check_model
from job.tune.model.stored.mxfp4 import decoded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch with CUDA")

ROUNDING = 2.0**-8
HEADS, WIDTH, WINDOW = 16, 64, 128
"""gpt-oss's width and window; a quarter of its heads."""
LENGTHS = (300, 1, 129, 640, 0, 128, 6)
"""Tokens of documents: below, at and above the window and a block; one is empty, as a full micro-batch's padding is."""


def off(found, expected):
    """Difference as a share of the expected norm."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def inputs(key_heads=2, lengths=LENGTHS):
    torch.manual_seed(0)
    parts = [
        torch.randn(sum(lengths), heads, WIDTH, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, key_heads, key_heads)
    ]
    sinks = torch.linspace(-6, 8, HEADS, device=CUDA).to(torch.bfloat16)  # from one that does nothing to most of a row
    counts = torch.tensor(lengths)
    return parts, torch.cat([torch.zeros(1), counts.cumsum(0)]).int().to(CUDA), counts, sinks


def by_the_formula(parts, window, sinks):
    """fp32, a document at a time: softmax over what a token sees and its head's sink, of which the values are none."""
    outputs = []
    for part in zip(*(torch.split(each.float(), LENGTHS) for each in parts), strict=True):
        query, key, value = part
        groups, tokens = query.shape[1] // key.shape[1], len(query)
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = WIDTH**-0.5 * torch.einsum("qhw,khw->hqk", query, key)
        distance = torch.arange(tokens, device=CUDA)[:, None] - torch.arange(tokens, device=CUDA)
        scores = scores.masked_fill((distance < 0) | (distance >= (window or tokens + 1)), float("-inf"))
        weights = torch.cat([scores, sinks.float()[:, None, None].expand(-1, tokens, 1)], dim=-1).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khw->qhw", weights[..., :-1], value))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("own", [False, True], ids=["torch's", "ours"])
@pytest.mark.parametrize("key_heads", [2, HEADS])
def test_attention_with_sinks_and_its_gradients_are_those_of_fp32_and_the_same_bits_each_time(key_heads, own, window):
    parts, cu_seqlens, lengths, sinks = inputs(key_heads)
    blocks = blocks_of(cu_seqlens, sum(LENGTHS)) if own else None
    expected = by_the_formula(parts, window, sinks)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, parts, grad)
    runs = []
    for _ in range(3):
        found = document_attention(*parts, cu_seqlens, lengths, blocks, WIDTH**-0.5, window, sinks)[0]
        runs.append([found.detach(), *torch.autograd.grad(found, parts, grad.bfloat16())])

    for found, other in zip(runs[0], [expected, *wanted], strict=True):
        assert off(found, other) < 4 * ROUNDING
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("own", [False, True], ids=["torch's", "ours"])
def test_sinks_change_what_attention_gives(own):
    """A head whose sink takes nearly all of each row gives nearly nothing; one whose sink is far below gives all."""
    parts, cu_seqlens, lengths, _ = inputs()
    blocks = blocks_of(cu_seqlens, sum(LENGTHS)) if own else None
    sinks = torch.tensor([30.0, -60.0] * (HEADS // 2), device=CUDA)
    limits = cu_seqlens, lengths, blocks, WIDTH**-0.5, WINDOW
    with_sinks, without = (document_attention(*parts, *limits, *beside)[0] for beside in ((sinks,), ()))
    assert float(with_sinks[:, ::2].abs().max()) < 1e-6
    assert torch.equal(with_sinks[:, 1::2], without[:, 1::2])


@pytest.mark.parametrize("own", [False, True], ids=["torch's", "ours"])
def test_a_document_does_not_change_its_neighbours(own):
    parts, cu_seqlens, lengths, sinks = inputs()
    blocks = blocks_of(cu_seqlens, sum(LENGTHS)) if own else None
    others = [torch.cat([part[: LENGTHS[0]].flip(0), part[LENGTHS[0] :]]).detach() for part in parts]
    before, after = (
        document_attention(*each, cu_seqlens, lengths, blocks, WIDTH**-0.5, WINDOW, sinks)[0]
        for each in (parts, others)
    )
    assert torch.equal(before[LENGTHS[0] :], after[LENGTHS[0] :])
    assert not torch.equal(before[: LENGTHS[0]], after[: LENGTHS[0]])


@pytest.mark.parametrize("own", [False, True], ids=["torch's", "ours"])
def test_attention_with_sinks_passes_torch_s_opcheck(own):
    parts, cu_seqlens, lengths, sinks = inputs()
    blocks = blocks_of(cu_seqlens, sum(LENGTHS)) if own else None
    opcheck(document_attention, (*parts, cu_seqlens, lengths, blocks, 0.125, WINDOW, sinks))

    parts = [part.detach() for part in parts]
    out, *kept = document_attention(*parts, cu_seqlens, lengths, blocks, 0.125, WINDOW, sinks)
    places = cu_seqlens, lengths, blocks, sinks
    opcheck(attention_op._backward_op, (out, *parts, out, *kept, *places, 0.125, WINDOW))


@pytest.mark.parametrize("own", [False, True], ids=["torch's", "ours"])
def test_no_square_of_a_long_document_is_in_memory(own):
    """Of 16,384 tokens and 16 heads one would take 8 GiB in bf16."""
    lengths = (16_384,)
    parts, cu_seqlens, counts, sinks = inputs(lengths=lengths)
    blocks = blocks_of(cu_seqlens, sum(lengths)) if own else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = document_attention(*parts, cu_seqlens, counts, blocks, WIDTH**-0.5, None, sinks)[0]
    torch.autograd.grad(out, parts, torch.randn_like(out))
    assert torch.cuda.max_memory_allocated() - before < GIB


def test_our_kernels_with_sinks_are_found_to_be_right():
    assert difference_from_formula(CUDA, heads=64, key_heads=8, width=64, sinks=True) is None


def test_mxfp4_is_decoded_to_the_same_bits_as_on_the_cpu():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].expand(1, 255, 16).contiguous()
    on_the_gpu = decoded(blocks.to(CUDA), scales.to(CUDA)).contiguous().cpu()
    assert torch.equal(on_the_gpu.view(torch.int16), decoded(blocks, scales).contiguous().view(torch.int16))


def test_a_base_in_mxfp4_is_its_decoded_base_to_the_bit(tmp_path):
    folder = write_mxfp4(tmp_path / "base", decoded=tmp_path / "decoded")
    ours, plain = (
        load_base(each, device=CUDA, dtype=torch.bfloat16).state_dict() for each in (folder, tmp_path / "decoded")
    )
    assert ours.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in ours.items())


@pytest.mark.parametrize("targets", ["all-linear", ("all-linear", "experts")])
def test_gpt_oss_is_packed_and_trained_by_our_attention_and_our_products(tmp_path, targets):
    """Sixteen experts, with biases and a clamped gate, heads as wide as gpt-oss's, every second layer windowed."""
    config = CONFIG_MAPPING["gpt_oss"](
        vocab_size=512,
        hidden_size=256,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=WIDTH,
        num_local_experts=16,
        num_experts_per_tok=4,
        sliding_window=WINDOW,
        initializer_range=0.06,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("sinks", "proj_bias")):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", device=CUDA, dtype=torch.bfloat16)
    adapted = PackedModel(attach_lora(base, LoraSection(r=4, targets=targets), source="tiny", revision=None, seed=0))
    check_model(adapted)
    assert adapted.is_packed  # documents are apart to the bit
    choice = choose_engine(adapted, "auto", backward=torch.autograd.backward)
    assert not choice.left_to_peft, choice.reason
    if torch.cuda.get_device_capability()[0] == 9:
        assert adapted.attention.own, adapted.attention.reason
