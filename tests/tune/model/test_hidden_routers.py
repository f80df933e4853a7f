"""Mixtures whose routers and experts stand otherwise than in most: no adapter on a router, no noise, no silent pass."""

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from layouts import changed, config_with, tensors_of
from peft.tuners.lora import LoraLayer
from test_promises import held
from tiny import CPU, attach_lora, load_base
from tiny_families import SIZES, write_family
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from job.core.errors import DataError, UsageError
from job.core.recipe.schema import LoraSection
from job.tune.data.trial_documents import one_row
from job.tune.engines.families import refuse_family, words_on
from job.tune.engines.packed_model import PackedModel
from job.tune.model import adapter
from job.tune.model.config import empty_model
from job.tune.model.mixtures import experts_in

ZAYA = {"num_experts": 4, "moe_intermediate_size": 64}
SPARSE = {"num_hidden_layers": 4}
"""Of GLM's and DeepSeek's own sizes: on the meta device they take nothing."""


def config_of(name, own):
    return CONFIG_MAPPING[name](**own)


def adapted_in(config, targets="all-linear"):
    base, lora = empty_model(config), LoraSection(r=4, alpha=8, targets=targets)
    model = adapter._adapted(base, lora, adapter._check_targets(base, lora), revision=None)
    names = (name for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {name.removeprefix("base_model.model.") for name in names}


def routers_among(names):
    """By the words that transformers has for them, wherever they stand."""
    return [name for name in names if {"router", "gate", "router_gate"} & {*name.split(".")}]


def test_no_layer_of_a_router_gets_an_adapter():
    """ZAYA's are MLPs, which end in as many numbers as there are ways to go."""
    config = config_of("zaya", SIZES | ZAYA)
    linear = [name for name, module in empty_model(config).named_modules() if isinstance(module, nn.Linear)]
    assert len(routers_among(linear)) > len({name.rpartition(".")[0] for name in routers_among(linear)})
    found = adapted_in(config)
    assert not routers_among(found)
    assert {name.rpartition(".")[2] for name in found} >= {"q_proj", "k_proj", "o_proj"}
    with pytest.raises(UsageError, match="fc1 of ZayaForCausalLM chooses or weighs experts"):
        adapted_in(config, ("q_proj", "fc1"))


def mixtures_of_transformers():
    for name, kind in CONFIG_MAPPING.items():
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
            yield name


@pytest.mark.families
@pytest.mark.parametrize("name", mixtures_of_transformers())
def test_no_mixture_of_transformers_has_an_adapter_on_a_router(name):
    """At the sizes that their configs have by themselves, or at four layers where that is one of their sizes."""
    try:
        model = empty_model(config := config_of(name, {"num_hidden_layers": 4}))
    except Exception:  # noqa: BLE001 - a family that wants more to be said
        pytest.skip("not made by itself with four layers")
    if not experts_in(model):
        pytest.skip("no mixture")
    try:
        found = adapted_in(config)
    except UsageError as refusal:
        assert "lora.targets" in str(refusal)  # noqa: PT017 - refused by name is right, too
        return
    assert not routers_among(found)


def test_the_path_of_a_router_is_not_taken_for_its_experts():
    config = config_of("qwen3_moe", SIZES | {"num_experts": 4, "moe_intermediate_size": 64})
    with pytest.raises(UsageError, match=r"mlp\.gate of Qwen3MoeForCausalLM chooses or weighs experts"):
        adapted_in(config, ("q_proj", "mlp.gate"))


@pytest.mark.parametrize("name", ["glm_moe_dsa", "deepseek_v32"])
def test_what_chooses_tokens_for_sparse_attention_gets_no_adapter(name):
    """No gradient comes through the choice."""
    found = adapted_in(config_of(name, SPARSE))
    assert found
    assert not [path for path in found if ".indexer." in path]


def test_a_mixture_without_stacks_of_experts_is_refused_by_name():
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    dense, mixed = (config_of("doge", sizes | {"is_moe": is_moe, "num_experts": 16}) for is_moe in (False, True))
    refuse_family(dense)
    with pytest.raises(UsageError, match="doge is a mixture whose experts transformers does not keep in stacks"):
        refuse_family(mixed)
    assert [word for word in words_on(mixed) if word.startswith("`run` refuses this base: doge is a mixture")]


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("phimoe", {"router_jitter_noise": 0.01, "input_jitter_noise": 0.01}),
        ("phimoe", {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    ],
)
def test_a_router_has_no_noise_in_training(name, noise, tmp_path):
    """A document's loss would depend on what stands beside it, and a sum on how it is cut."""
    folder = config_with(write_family(tmp_path, name), **noise)
    model = PackedModel(
        attach_lora(
            load_base(folder, device=CPU, dtype=torch.float32), LoraSection(r=4), source="a/b", revision=None, seed=0
        )
    ).train()
    batch = one_row([torch.arange(3, 40), torch.arange(5, 21)])
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(model.summed_loss(batch, weight_per_target=1.0)[0].detach())
    assert torch.equal(*losses)
    said = any("their noise in training is left out" in word for word in words_on(model.model.get_base_model().config))
    assert said == any(noise.values())


def one_by_one(tensors):
    """Experts as bitsandbytes writes linear modules, as transformers 4 had them."""
    made = {}
    for name, value in tensors.items():
        if ".experts." not in name:
            made[name] = value
            continue
        packed, state = quantize_4bit(value.contiguous(), quant_type="nf4", compress_statistics=True)
        made |= {name: packed} | {f"{name}.{key}": each for key, each in state.as_dict(packed=True).items()}
    return made


def test_experts_that_are_published_in_4_bits_one_by_one_are_refused_as_such(tmp_path):
    """Copying such a model again would not help."""
    plain = write_family(tmp_path / "plain", "qwen3_moe")
    assert ".experts.0." in " ".join(tensors_of(plain))
    form = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    base = config_with(changed(plain, tmp_path / "base", one_by_one), quantization_config=form)

    with pytest.raises(DataError, match="the experts of Qwen3MoeForCausalLM are in 4 bits of bitsandbytes"):
        held(base)
