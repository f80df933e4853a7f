"""What layers of mixtures and hybrids are planned to keep, and backwards to take, is what they do."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from llama_2_7b import LLAMA_2_7B
from tiny import CPU, attach_lora, load_base
from tiny_families import FAMILIES, config_of
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from job.core.plan.memory import AdapterShape, ExpertsShape, memory_parts
from job.core.recipe.schema import LoraSection
from job.kernels import experts as grouped
from job.kernels.experts import Experts, ExpertsAdapter, ExpertsLinear, experts
from job.kernels.ops import Gate
from job.kernels.weights import QuantisedExperts
from job.tune.data.trial_documents import one_row
from job.tune.engines.packed_model import PackedModel
from job.tune.model.config import empty_model, shape_of
from job.tune.model.mixtures import experts_modules, gate_of
from job.tune.model.recurrent import _Bytes

RANK = 8  # whole vectors: others are filled up, and copied for that
ADAPTER = AdapterShape(parameters=1, rank=RANK, optimizer="adamw_8bit")
SIZES = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
CHOSEN_OF = {"num_experts_per_tok": 4}
OWN = {
    "gpt_oss": {**CHOSEN_OF, "num_local_experts": 8, "sliding_window": 16},
    "qwen3_moe": {**CHOSEN_OF, "num_experts": 8, "moe_intermediate_size": 128, "norm_topk_prob": True},
    "mixtral": {**CHOSEN_OF, "num_local_experts": 8},
    "granitemoe": {**CHOSEN_OF, "num_local_experts": 8, "hidden_size": 512},
}
"""Mixtures that are packed: their heads are wider than the stream, or as wide as it."""


DELTA = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 56,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 32, "mamba_n_groups": 1, "mamba_chunk_size": 64}
HYBRIDS = {
    "qwen3_5_text": ("linear_attention", {**DELTA, "intermediate_size": 1100}),
    "qwen3_5_moe_text": (
        "linear_attention",
        {**DELTA, **CHOSEN_OF, "num_experts": 8, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 160},
    ),
    "olmo_hybrid": ("linear_attention", {**DELTA, "intermediate_size": 1100}),
    "lfm2": ("conv", {"intermediate_size": 1100, "hidden_size": 512, "head_dim": 64}),
    "granitemoehybrid": (
        "mamba",
        {**MAMBA, "mamba_d_head": 80, "num_local_experts": 0, "shared_intermediate_size": 1100},
    ),
    "falcon_h1": (None, {**MAMBA, "mamba_d_head": 80, "mamba_d_ssm": 640, "intermediate_size": 1100}),
}
"""What three of four layers are, None: each layer is both; and sizes. By transformers' plain code, on the CPU."""
SIZES_OF_HYBRIDS = {"hidden_size": 320, "head_dim": 72, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def config_with(name, layers):
    own = OWN[name] if name in OWN else SIZES_OF_HYBRIDS | HYBRIDS[name][1]
    if name in HYBRIDS and (recurrent := HYBRIDS[name][0]) is not None:
        attention = "attention" if recurrent == "mamba" else "full_attention"
        own |= {"layer_types": [*(recurrent,) * 3, attention] * (layers // 4)}
    return CONFIG_MAPPING[name](**{**SIZES, **own, "num_hidden_layers": layers})


def kept_bytes(folder, config, tokens, monkeypatch):
    """What a forward in bf16 leaves for the backward, beside what was there before it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    base = load_base(folder, device=CPU, dtype=torch.bfloat16)
    model = PackedModel(attach_lora(base, LoraSection(r=RANK), source="tiny", revision=None, seed=0)).train()
    there = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    found, rows = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage
        return tensor

    class Rows(grouped.Rows):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            rows.append(self)

    with monkeypatch.context() as patched:
        patched.setattr(grouped, "Rows", Rows)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            documents = [torch.randint(3, config.vocab_size, (tokens // 2,)) for _ in range(2)]
            result = model.summed_loss(one_row(documents), weight_per_target=1.0)
    for each in rows:
        for tensor in vars(each).values():
            if isinstance(tensor, torch.Tensor):
                keep(tensor)
    assert result is not None  # alive, and all that it keeps
    return sum(storage.nbytes() for storage in found.values())


def saved_by_a_layer(name, tmp_path, monkeypatch, *, layers, few):
    """Bytes of a token: what more tokens keep more in more layers."""
    kept = {
        (number, tokens): kept_bytes(tmp_path / f"{number}-{tokens}", config_with(name, number), tokens, monkeypatch)
        for number in layers
        for tokens in (few, 2 * few)
    }
    of_tokens = [(kept[number, 2 * few] - kept[number, few]) / few for number in layers]
    return (of_tokens[1] - of_tokens[0]) / (layers[1] - layers[0])


@pytest.mark.parametrize("name", OWN)
def test_what_a_layer_of_a_mixture_is_planned_to_keep_is_what_autograd_saves(name, tmp_path, monkeypatch):
    """On the CPU attention keeps no sums."""
    saved = saved_by_a_layer(name, tmp_path, monkeypatch, layers=(2, 4), few=128)
    shape = shape_of(config_with(name, 4))
    planned = memory_parts(shape, ADAPTER, "generic", compiled=False).token_layer

    assert planned - 4 * shape.heads == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize("name", HYBRIDS)
def test_what_a_layer_of_a_hybrid_is_planned_to_keep_is_what_autograd_saves_or_a_little_more(
    name, tmp_path, monkeypatch
):
    """The mean of four layers; gates and norms of heads are not counted one by one."""
    saved = saved_by_a_layer(name, tmp_path, monkeypatch, layers=(4, 8), few=512)
    planned = memory_parts(shape_of(config_with(name, 8)), ADAPTER, "generic", compiled=False).token_layer

    assert 0.99 * saved <= planned <= 1.09 * saved


# --- the backward of experts ------------------------------------------------------------------------------------------

NUMBER, CHOSEN, HIDDEN = 16, 4, 192
_NO_KERNELS = SimpleNamespace(
    **dict.fromkeys(
        ("dequantise_experts", "combine_rows", "gate_forward", "gate_backward", "sums_by_expert"),
        lambda *_: None,  # they write into what they are given, and take nothing
    )
)
_EMPTY = torch.empty(0, device="meta")


def by_code(z):
    """A gate that is no kernel."""
    gate, up = z.chunk(2, dim=-1)
    return functional.gelu(gate) * up


def linear_of(height, width, *, bias, adapter):
    def there(*sides, dtype=torch.bfloat16):
        return torch.empty(*sides, dtype=dtype, device="meta", requires_grad=dtype == torch.float32)

    no_parts = dict.fromkeys(("scales", "scales_code", "outer_scales", "offsets", "code"), _EMPTY)
    factors = {
        "a": there(NUMBER * RANK, width, dtype=torch.float32),
        "b": there(height, RANK * NUMBER, dtype=torch.float32),
    }
    return ExpertsLinear(
        weights=QuantisedExperts(packed=there(NUMBER, 0), **no_parts, height=height, width=width),
        bias=there(NUMBER, height) if bias else None,
        adapter=ExpertsAdapter(**factors, scaling=1.0) if adapter else None,
    )


def _factors(linear):
    return () if linear.adapter is None else (linear.adapter.a, linear.adapter.b)


def taken_by_backward(tokens, of):
    """The most that the backward of a GPU's path takes at once, the gradient that it starts from included.

    On the meta device nothing is computed, and every tensor that would be there is counted.
    """
    x, weights = (
        torch.empty(tokens, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for width in (HIDDEN, CHOSEN)
    )
    chosen = torch.empty(tokens, CHOSEN, dtype=torch.int64, device="meta")
    with _Bytes() as there:
        result = experts(x, chosen, weights, of)
        kept = there.now - result.nbytes
        there.most = there.now
        torch.autograd.backward(result, torch.empty_like(result.detach()))
        return there.most - kept - result.nbytes


@pytest.mark.parametrize("inner", [128, 512])
@pytest.mark.parametrize(
    ("gate", "bias", "adapter"),
    [
        (Gate(), False, False),
        (Gate(), True, False),
        (by_code, False, False),
        (Gate(), False, True),
        (Gate(), True, True),
    ],
)
def test_what_the_backward_of_experts_is_planned_to_take_is_what_it_takes(gate, bias, adapter, inner, monkeypatch):
    """Of few tokens most of it are dequantised weights, of many none; ranks and their gradients are not in the plan."""
    monkeypatch.setattr(grouped, "_goes_in_groups", lambda _: True)
    monkeypatch.setattr(grouped, "ops_of", lambda _: _NO_KERNELS)
    of = Experts(
        first=linear_of(2 * inner, HIDDEN, bias=bias, adapter=adapter),
        gate=gate,
        second=linear_of(HIDDEN, inner, bias=bias, adapter=adapter),
    )
    shape = ExpertsShape(
        parameters=NUMBER * 3 * HIDDEN * inner,
        sides=1,
        number=NUMBER,
        chosen=CHOSEN,
        first=2 * inner,
        inner=inner,
        largest=NUMBER * 2 * HIDDEN * inner,
        has_bias=bias,
        gate_in_one=gate is not by_code,
    )
    base = replace(LLAMA_2_7B, hidden=HIDDEN, intermediate=CHOSEN * inner, experts=shape)
    parts = memory_parts(base, replace(ADAPTER, on_experts=adapter), "generic", compiled=False)
    for tokens in (64, 8192):
        planned = max(parts.workspace + tokens * parts.token, tokens * parts.token_alone)
        its_gradients = 4 * sum(each.numel() for linear in (of.first, of.second) for each in _factors(linear))
        assert planned <= taken_by_backward(tokens, of) * 1.02
        assert planned + its_gradients >= taken_by_backward(tokens, of) * 0.95


MIXTURES = [name for name in FAMILIES if next(experts_modules(empty_model(config_of(name))), None)]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_shape_says_what_stands_between_its_experts_products(name):
    modules = [module for _, module in experts_modules(empty_model(config_of(name)))]
    experts_shape = shape_of(config_of(name)).experts

    assert experts_shape.gate_in_one == all(isinstance(gate_of(module), Gate) for module in modules)
    assert experts_shape.has_bias == (name == "gpt_oss")
