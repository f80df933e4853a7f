import json

import pytest
import torch
from safetensors import safe_open

from bench.random_base import SHAPES, config_of, files_of


def test_the_base_is_one_that_the_product_loads(base):
    from job.tune.model.base import load_base
    from job.tune.model.config import load_tokenizer

    loaded = load_base(base, device=torch.device("cpu"), dtype=torch.bfloat16)
    ids = load_tokenizer(base)("3 5 8", return_tensors="pt").input_ids

    assert ids[0].tolist() == [1, 6, 8, 11]
    assert torch.isfinite(loaded(input_ids=ids).logits).all()


def test_each_layer_has_a_file_in_bf16(base):
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    files = [{n for n, file in index.items() if file == name} for name in set(index.values())]

    assert {name.split(".")[2] for names in files if len(names) > 1 for name in names} == {"0", "1"}
    with safe_open(base / index["lm_head.weight"], "pt") as file:
        head = file.get_tensor("lm_head.weight")
    assert head.dtype == torch.bfloat16
    assert float(head.float().std()) == pytest.approx(0.02, rel=0.05)


def test_a_base_in_bitsandbytes_form_is_one_that_the_product_loads_as_it_is(tmp_path, tokenizer_folder):
    from bench.random_base import write_base
    from job.tune.model.base import load_base

    size = write_base("tiny-llama", tmp_path / "base", tokenizer_folder, form="bnb4")
    loaded = load_base(tmp_path / "base", device=torch.device("cpu"), dtype=torch.bfloat16)

    assert size < 10**7
    assert loaded.model.layers[0].mlp.up_proj.weight.quant_state.nested
    assert torch.isfinite(loaded(input_ids=torch.tensor([[1, 6, 8, 11]])).logits).all()


@pytest.mark.parametrize(
    ("shape", "form", "experts"),
    [
        ("tiny-qwen3-moe", "bf16", None),
        ("tiny-qwen3-moe", "bnb4", "experts in 4 bits"),
        ("tiny-gpt-oss", "bnb4", "experts in 4 bits"),
        ("tiny-gpt-oss", "mxfp4", "experts in 4 bits"),
        ("tiny-qwen3.5-moe", "bnb4", "experts in 4 bits"),
    ],
)
def test_a_mixture_in_any_form_is_one_that_the_product_loads(shape, form, experts, tmp_path, tokenizer_folder):
    from bench.random_base import write_base
    from job.tune.model.base import load_base
    from job.tune.model.experts import dequantised_experts, in_four_bits
    from job.tune.model.four_bit import form_of

    write_base(shape, tmp_path / "base", tokenizer_folder, form=form)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert ("quantization_config" in config) == (form != "bf16")
    loaded = load_base(tmp_path / "base", device=torch.device("cpu"), dtype=torch.float32)
    held = [module for module in loaded.modules() if in_four_bits(module)]
    assert len(held) == 2
    assert experts is None or experts in form_of(loaded)
    for module in held:
        for name in in_four_bits(module):
            assert float(dequantised_experts(module, name, dtype=torch.float32).std()) == pytest.approx(0.02, rel=0.2)
    assert torch.isfinite(loaded(input_ids=torch.tensor([[1, 6, 8, 11]])).logits).all()


def test_a_dense_hybrid_in_bitsandbytes_form_is_one_that_the_product_loads(tmp_path, tokenizer_folder):
    from bench.random_base import write_base
    from job.tune.model.base import load_base
    from job.tune.model.four_bit import form_of

    write_base("tiny-qwen3.5", tmp_path / "base", tokenizer_folder, form="bnb4")
    loaded = load_base(tmp_path / "base", device=torch.device("cpu"), dtype=torch.float32)
    assert "1 not (lm_head)" in form_of(loaded)
    norms = {name: float(value.mean()) for name, value in loaded.named_parameters() if "norm.weight" in name}
    assert {value for name, value in norms.items() if name.endswith("linear_attn.norm.weight")} == {1.0}
    assert {value for name, value in norms.items() if not name.endswith("linear_attn.norm.weight")} == {0.0}
    assert torch.isfinite(loaded(input_ids=torch.tensor([[1, 6, 8, 11]])).logits).all()


@pytest.mark.parametrize("shape", ["tiny-qwen3-moe", "tiny-gpt-oss", "tiny-qwen3.5-moe"])
def test_in_unsloth_s_form_experts_are_whole_stacks_or_linear_layers(shape, tmp_path, tokenizer_folder):
    """As the loader of unsloth_zoo 2026.10.9 looks for them; it cannot be imported without a GPU."""
    from bitsandbytes.functional import QuantState

    from bench.random_base import write_base

    write_base(shape, tmp_path / "base", tokenizer_folder, form="unsloth")
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    of_a_layer = {name.partition("layers.0.mlp.")[2] for name in index if "layers.0.mlp." in name}
    assert not any("visual" in name or "language_model" in name for name in index)
    if shape == "tiny-gpt-oss":
        name, parts = "experts.gate_up_projs.3.weight", "model.layers.0.mlp.experts.gate_up_projs.3.weight"
        assert {"router.linear.weight", "router.linear.bias", "experts.down_projs.0.bias", name} <= of_a_layer
    else:
        name, parts = "experts.gate_up_proj", "model.layers.0.mlp.experts.gate_up_proj"
        assert name in of_a_layer
    with safe_open(tmp_path / "base" / index[parts], "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{parts}.")}  # noqa: SIM118
    state = QuantState.from_dict(
        qs_dict={f"weight.{key[len(parts) + 1 :]}": each for key, each in found.items()}, device="cpu"
    )
    assert state.nested
    assert [*state.shape] == ([256, 64] if shape == "tiny-gpt-oss" else [4, 128, 64])


def test_other_bases_are_not_published_in_mxfp4(tmp_path, tokenizer_folder):
    from bench.random_base import write_base

    with pytest.raises(SystemExit, match="tiny-llama: --form mxfp4 is how gpt_oss is published"):
        write_base("tiny-llama", tmp_path / "base", tokenizer_folder, form="mxfp4")


SIZES = {
    "llama2-7b": 6.738,
    "mistral-7b": 7.248,
    "qwen3-8b": 8.191,
    "llama3.1-8b": 8.030,
    "llama3.1-70b": 70.554,
    "phi4-14b": 14.660,
    "gemma3-12b": 12.187,
    "ministral3-8b": 8.918,
    "gpt-oss-20b": 20.915,
    "qwen3-30b-a3b": 30.532,
    "qwen3.5-9b": 9.410,
    "qwen3.5-35b-a3b": 35.107,
}


@pytest.mark.parametrize(("shape", "billions"), SIZES.items())
def test_shapes_are_those_of_the_models(shape, billions):
    assert shape in SHAPES
    files, _ = files_of(config_of(shape))

    assert sum(size.numel() for file in files for size in file.values()) / 1e9 == pytest.approx(billions, abs=6e-4)
