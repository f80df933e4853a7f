"""Merged weights are what PEFT's own merge gives, rounded once, in files of the base's own cut."""

import json
import re

import bitsandbytes as bnb
import pytest
import torch
from layouts import bnb4_base, changed, config_with, tensors_of
from merged import adapted, lora, merge, moved, save_adapter
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CPU, config_of, write_base
from tiny_families import write_family
from tiny_wrappers import in_the_other_layout, write_wrapper
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from job.core.errors import DataError
from job.core.recipe.schema import LoraSection
from job.tune.loop.checkpoint import ADAPTER_FILES, adapter_to_publish
from job.tune.merging.preparing import prepare_merge
from job.tune.model.adapter import attach_lora, chosen_by_all_linear
from job.tune.model.base import load_base
from job.tune.model.config import read_wrapper

DENSE = (
    *("llama", "llama, tied", "llama, biases", "qwen3", "gemma3n_text", "phi3", "gpt2", "gpt_neo", "gpt_neox", "opt"),
    *("bloom", "falcon", "olmo_hybrid", "mamba2", "recurrent_gemma", "nemotron_h", "persimmon", "minicpm3", "xglm"),
)
MIXTURES = (
    *("mixtral", "qwen3_moe", "qwen3_5_moe_text", "gpt_oss", "llama4_text", "granitemoe", "phimoe", "deepseek_v3"),
    *("jamba", "lfm2_moe", "ernie4_5_moe", "hunyuan_v1_moe", "olmoe", "minimax"),
)
"""Among them each way in which files hold experts: one by one or stacked, gate and up apart or in one, transposed."""
FEW = 2000
"""Values of a vector: how its sum is ordered may change a last bit."""
_OF_EACH_KIND = {"llama", "llama, tied", "gpt2", "olmo_hybrid", "mixtral", "qwen3_moe", "gpt_oss", "llama4_text"}


def each_of(*families):
    """One of each kind in `make test`, the others where all families are asked for."""
    return [pytest.param(name, marks=[] if name in _OF_EACH_KIND else pytest.mark.families) for name in families]


def weights_of(folder, kind=AutoModelForCausalLM):
    model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.state_dict()


def assert_merged(folder, model, *, kind=AutoModelForCausalLM, dtype=torch.bfloat16, beside=()):
    """The folder's weights are what PEFT merges, rounded once; returns how many of them the adapter changed."""
    before = {
        name.replace(".base_layer", ""): value.clone() for name, value in model.get_base_model().state_dict().items()
    }
    wanted, found = model.merge_and_unload().state_dict(), weights_of(folder, kind)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name not in beside and not torch.equal(value.to(dtype).float(), found[name].float()):
            assert value.numel() < FEW, name
            assert torch.allclose(value.float(), found[name].float(), atol=2e-6), name
    return sum(not torch.equal(before[name], value) for name, value in wanted.items() if name in before)


@pytest.mark.parametrize("family", each_of(*DENSE, *MIXTURES))
def test_every_linear_layer_is_what_peft_merges(family, tmp_path):
    base = write_family(tmp_path / "base", family)
    targets = chosen_by_all_linear(AutoModelForCausalLM.from_pretrained(base)) or "all-linear"
    model = adapted(base, lora(targets))
    merge(base, save_adapter(model, tmp_path / "adapter"), tmp_path / "merged")

    assert assert_merged(tmp_path / "merged", model) >= 2
    assert {*tensors_of(tmp_path / "merged")} == {*tensors_of(base)}


@pytest.mark.parametrize("family", each_of(*MIXTURES))
def test_experts_are_what_peft_merges(family, tmp_path):
    """The factors of `target_parameters`."""
    base = write_family(tmp_path / "base", family)
    model = adapted(base, lora([], target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    merge(base, save_adapter(model, tmp_path / "adapter"), tmp_path / "merged")

    assert assert_merged(tmp_path / "merged", model) >= 2
    assert {name: t.shape for name, t in tensors_of(tmp_path / "merged").items()} == {
        name: t.shape for name, t in tensors_of(base).items()
    }


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"r": 3, "lora_alpha": 7},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 31}},
        {"layers_to_transform": [1]},
    ],
    ids=str,
)
def test_by_how_much_and_where_the_adapter_counts_is_as_its_config_says(options, tmp_path):
    base = write_base(tmp_path / "base", config_of("llama"))
    model = adapted(base, lora(**options))
    merge(base, save_adapter(model, tmp_path / "adapter"), tmp_path / "merged")

    assert assert_merged(tmp_path / "merged", model, dtype=torch.float32) == (
        2 if "layers_to_transform" in options else 4
    )


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 25)[None]).logits


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_head_or_embeddings_unties_them(target, tied, tmp_path):
    base = write_base(tmp_path / "base", config_of("llama", tied=tied))
    model = adapted(base, lora(["q_proj", target]))
    wanted = logits_of(model)
    prepared = merge(base, save_adapter(model, tmp_path / "adapter"), tmp_path / "merged")
    assert prepared.untied == tied
    config_with(tmp_path / "merged", tie_word_embeddings=False)

    merged, found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"]
    assert torch.allclose(logits_of(merged), wanted, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits_of(plain), wanted, atol=1e-2)
    same = merged.model.embed_tokens.weight if target == "lm_head" else merged.lm_head.weight
    assert torch.equal(same, plain.model.embed_tokens.weight if target == "lm_head" else plain.lm_head.weight)


def test_a_tied_head_that_is_not_adapted_stays_tied(tmp_path):
    base = write_base(tmp_path / "base", config_of("llama", tied=True))
    prepared = merge(base, save_adapter(adapted(base, lora()), tmp_path / "adapter"), tmp_path / "merged")

    assert not prepared.untied
    assert "lm_head.weight" not in tensors_of(tmp_path / "merged")


def test_the_files_are_cut_as_the_bases_are(tmp_path):
    base = write_base(tmp_path / "base", config_of("llama"), most_bytes="150KB")
    model = adapted(base, lora())
    prepared = merge(base, save_adapter(model, tmp_path / "adapter"), tmp_path / "merged")

    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    for shard in shards:
        assert {*load_file(base / shard)} == {*load_file(tmp_path / "merged" / shard)}
    index, theirs = (
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (tmp_path / "merged", base)
    )
    assert index["weight_map"] == theirs["weight_map"]
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"] == prepared.weights.bytes
    assert_merged(tmp_path / "merged", model, dtype=torch.float32)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_base_that_is_published_in_4_bits_is_dequantised(double, quant_type, tmp_path):
    plain = write_base(tmp_path / "plain", config_of("llama"))
    base = bnb4_base(plain, tmp_path / "base", bnb_4bit_use_double_quant=double, bnb_4bit_quant_type=quant_type)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": "cpu"})
    model = moved(get_peft_model(loaded, lora()))
    save_adapter(model, tmp_path / "adapter")
    prepare = merge(base, tmp_path / "adapter", tmp_path / "merged")
    config_with(tmp_path / "merged", quantization_config=None)

    found = weights_of(tmp_path / "merged")
    assert prepare.weights.dtype == "BF16"
    assert not any("absmax" in name or "quant" in name for name in tensors_of(tmp_path / "merged"))
    for name, module in loaded.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            parent = model.get_submodule("base_model.model." + name.removesuffix(".base_layer"))
            if hasattr(parent, "lora_A"):
                values = values + parent.get_delta_weight("default").float()
            wanted = found[f"{name.removesuffix('.base_layer')}.weight"]
            assert torch.allclose(values.bfloat16().float(), wanted, atol=1e-2 * float(values.abs().max())), name
            assert float((values.bfloat16().float() != wanted).float().mean()) < 0.01, name


@pytest.mark.parametrize("tied", [True, False])
def test_onto_quantised_is_the_base_that_was_trained_on_with_the_adapter_on_it(tied, tmp_path):
    base = write_base(tmp_path / "base", config_of("llama", tied=tied))
    model = adapted(base, lora())
    merge(base, save_adapter(model, tmp_path / "adapter"), tmp_path / "merged", onto="quantised")

    found, trained_on = weights_of(tmp_path / "merged"), load_base(base, device=CPU, dtype=torch.float32)
    checked = 0
    for name, module in trained_on.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            adapter = model.get_submodule(f"base_model.model.{name}")
            if hasattr(adapter, "lora_A"):
                values = values + adapter.get_delta_weight("default")
            # In bf16, as weights are quantised on processors that compute in it: half a last place of bf16.
            assert torch.allclose(found[f"{name}.weight"], values, rtol=2**-7, atol=1e-3), name
            checked += 1
    assert checked == 14
    plain = weights_of(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(found[name], plain[name])


@pytest.mark.parametrize(
    ("wrapper", "other_layout"),
    [
        ("qwen3_vl_moe", False),
        *((name, other) for name in ("gemma3", "qwen2_5_vl", "llava") for other in (False, True)),
    ],
)
def test_the_decoder_of_a_multimodal_model_is_merged_inside_the_whole(wrapper, other_layout, tmp_path):
    base = write_wrapper(tmp_path / "base", wrapper)
    if other_layout:
        in_the_other_layout(base)
    loaded = load_base(base, device=CPU, dtype=torch.float32)
    trained = moved(
        attach_lora(loaded, LoraSection(r=4, alpha=12, targets="all-linear"), source="a/b", revision=None, seed=0)
    )
    adapter = tmp_path / "adapter"
    trained.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    adapter_to_publish(trained, read_wrapper(base)).write(tmp_path / "own" / ADAPTER_FILES[0], adapter)
    merge(base, adapter, tmp_path / "merged")

    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    assert_merged(tmp_path / "merged", PeftModel.from_pretrained(whole, adapter), kind=AutoModelForImageTextToText)
    merged, before = tensors_of(tmp_path / "merged"), tensors_of(base)
    assert merged.keys() == before.keys()
    assert {name for name in merged if not torch.equal(merged[name], before[name])}
    assert all(torch.equal(merged[n], before[n]) for n in merged if re.search("vision|visual|projector", n))


def test_of_a_multimodal_base_in_4_bits_all_parts_are_dequantised(tmp_path):
    plain = write_wrapper(tmp_path / "plain", "gemma3")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    options = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}, "quantization_config": nf4}
    AutoModelForImageTextToText.from_pretrained(plain, **options).save_pretrained(tmp_path / "base")
    assert any("vision" in name and "absmax" in name for name in tensors_of(tmp_path / "base"))
    text = load_base(tmp_path / "base", device=CPU, dtype=torch.float32)
    trained = attach_lora(text, LoraSection(r=4, alpha=8, targets=["q_proj"]), source="a/b", revision=None, seed=0)
    trained.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    published = adapter_to_publish(trained, read_wrapper(tmp_path / "base"))
    published.write(tmp_path / "own" / ADAPTER_FILES[0], tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    config_with(tmp_path / "merged", quantization_config=None)

    assert not any(tensor.dtype == torch.uint8 for tensor in tensors_of(tmp_path / "merged").values())
    merged, checked = weights_of(tmp_path / "merged", AutoModelForImageTextToText), 0
    options = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    for name, module in AutoModelForImageTextToText.from_pretrained(tmp_path / "base", **options).named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            assert torch.equal(merged[f"{name}.weight"], values), name
            checked += "vision" in name
    assert checked > 4


def test_what_the_model_has_no_use_for_stays_in_the_files(tmp_path):
    base = write_base(tmp_path / "plain", config_of("llama"))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(8.0)}
    changed(base, tmp_path / "base", lambda tensors: tensors | extra)
    merge(tmp_path / "base", save_adapter(adapted(base, lora()), tmp_path / "adapter"), tmp_path / "merged")

    for name, value in extra.items():
        assert torch.equal(tensors_of(tmp_path / "merged")[name], value)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """A base, and an adapter for it."""
    base = write_base(tmp_path / "base", config_of("llama"))
    return base, save_adapter(adapted(base, lora()), tmp_path / "adapter")


def prepared(base, adapter):
    return prepare_merge(base, *(adapter / name for name in ADAPTER_FILES), onto="weights", device=CPU)


@pytest.mark.parametrize(
    "key",
    [
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens"]},
        {"bias": "all"},
        {"lora_bias": True},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"a_new_one": 1},
        {"peft_type": "IA3"},
    ],
    ids=str,
)
def test_a_kind_of_adapter_that_is_not_merged_is_refused(key, pair):
    base, adapter = pair
    path = adapter / ADAPTER_FILES[1]
    path.write_text(json.dumps(json.loads(path.read_text()) | key))

    with pytest.raises(DataError, match=r"adapter_config\.json: .*only what a run of this job has published"):
        prepared(base, adapter)


def test_an_adapter_of_another_model_is_refused(pair, tmp_path):
    base, adapter = pair
    weights = adapter / ADAPTER_FILES[0]
    tensors = load_file(weights)
    name = min(tensors)
    for wrong in (
        {n: t for n, t in tensors.items() if n != name},
        tensors | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)},
        tensors | {name: torch.zeros(4, 7)},
    ):
        save_file(wrong, weights)
        with pytest.raises(DataError, match="the adapter is another model's"):
            prepared(base, adapter)
    weights.write_bytes(b"no tensors")
    with pytest.raises(DataError, match="cannot be read"):
        prepared(base, adapter)


def test_numbers_that_are_not_finite_are_refused(pair, tmp_path):
    base, adapter = pair
    weights = adapter / ADAPTER_FILES[0]
    tensors = load_file(weights)
    name = next(n for n in tensors if "lora_B" in n)
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, weights)
    with pytest.raises(DataError, match="not every number is finite"):
        merge(base, adapter, tmp_path / "merged")


def test_a_sum_that_has_no_room_in_the_bases_dtype_is_refused(pair, tmp_path):
    base, adapter = pair
    half = changed(base, tmp_path / "half", lambda tensors: {n: t.half() for n, t in tensors.items()})
    weights = adapter / ADAPTER_FILES[0]
    save_file({n: t * 2000 for n, t in load_file(weights).items()}, weights)

    with pytest.raises(DataError, match=r"the sum is in torch\.float16; serve the adapter beside its base"):
        merge(half, adapter, tmp_path / "merged")
