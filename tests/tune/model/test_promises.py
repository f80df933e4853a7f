"""A base is what its config promises, or it is refused: from the headers alone, and once more when it is loaded."""

import shutil

import pytest
import torch
from layouts import changed, config_with, in_fp8, one, prefixed, spoilt, without
from tiny import CPU, config_of, write_base
from transformers import AutoModelForCausalLM, MixtralConfig

from job.core.errors import DataError
from job.edge.base.headers import read_headers
from job.edge.base.places import InFolder
from job.tune.model.base import load_base
from job.tune.model.promises import hold_to_promises

UP = "model.layers.1.mlp.up_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
BROKEN = {
    "a layer's MLP": (without("layers.1.mlp"), "3 tensors of the model are not in the files (model.layers.1.mlp.down"),
    "a norm": (
        without("layers.0.input_layernorm"),
        "1 tensor of the model is not in the files (model.layers.0.input_l",
    ),
    "the last norm": (without("model.norm"), "1 tensor of the model is not in the files (model.norm.weight)"),
    "the embedding": (without("embed_tokens"), "1 tensor of the model is not in the files (model.embed_tokens.weight)"),
    "the head": (without("lm_head"), "1 tensor of the model is not in the files (lm_head.weight)"),
    "a whole layer": (without("layers.1."), "9 tensors of the model are not in the files (model.layers.1.input_lay"),
    "everything": (lambda _tensors: {"x": torch.zeros(1)}, "21 tensors of the model are not in the files"),
    "compiled": (prefixed("_orig_mod."), "every name begins with _orig_mod., which a wrapper left there"),
    "of DDP": (prefixed("module."), "every name begins with module., which a wrapper left there"),
    "of FSDP": (prefixed("_fsdp_wrapped_module."), "every name begins with _fsdp_wrapped_module."),
    "fp8 by blocks, its section lost": (in_fp8(128), "are stored as F8_E4M3 (model.layers.0.mlp.down_proj.weight, "),
    "fp8 by tensors, its section lost": (in_fp8(0), "scales are left over: the weights were quantised"),
    "left-over scales": (
        lambda tensors: tensors | {f"{UP}_scale_inv": torch.ones(1, 1)},
        f"1 tensor of the files is not of the model ({UP}_scale_inv); scales are left over",
    ),
    "a layer more": (
        lambda tensors: tensors | {UP.replace("1", "2"): tensors[UP].clone()},
        "1 tensor of the files is not of the model (model.layers.2.mlp.up_proj.weight)",
    ),
    "fewer rows": (one(UP, lambda t: t[:100]), f"1 tensor is of another shape ({UP}: 100 x 64 in the files, 128 x 64"),
    "turned": (one(UP, lambda t: t.T), f"1 tensor is of another shape ({UP}: 64 x 128 in the files, 128 x 64 in"),
    "fewer tokens": (
        one("model.embed_tokens.weight", lambda t: t[:290]),
        "1 tensor is of another shape (model.embed_tokens.weight: 290 x 64 in the files, 300 x 64 in the model)",
    ),
    "in 8 bits": (one(UP, lambda t: t.to(torch.int8)), f"1 tensor is stored as I8 ({UP})"),
}


def headers_of(folder):
    place = InFolder(folder=folder)
    files = {name: size for name, size in place.files().items() if name.endswith(".safetensors")}
    return read_headers(files, place.read_part, source="the/base")


def held(folder):
    return hold_to_promises(folder, headers_of(folder), source="the/base")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("whole") / "base", config_of("llama"))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_missing_left_over_or_of_another_kind_is_named(broken, sharded, whole, tmp_path):
    change, said = BROKEN[broken]
    folder = changed(whole, tmp_path / "base", change, sharded=sharded)

    with pytest.raises(DataError) as from_headers:
        held(folder)
    assert str(from_headers.value).startswith("the/base: the weights are not what config.json promises: ")
    assert said in str(from_headers.value)
    with pytest.raises(DataError) as when_loaded:
        load_base(folder, device=CPU, dtype=torch.bfloat16)
    assert said in str(when_loaded.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.embed_tokens.weight"])
def test_what_is_not_finite_is_named_when_it_is_loaded(name, value, whole, tmp_path):
    folder = changed(whole, tmp_path / "base", one(name, spoilt(value)))

    held(folder)
    with pytest.raises(DataError, match=rf"NaN or infinity in {name}, in 1 of all tensors"):
        load_base(folder, device=CPU, dtype=torch.bfloat16)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_a_whole_base_is_let_through_whatever_its_tensors_are_called(whole, tied_base, bases, tmp_path, sharded):
    same = [whole, tied_base, *bases.values()]
    # As LlamaModel alone is saved, and as old checkpoints are, with a buffer in each layer.
    bare = changed(tied_base, tmp_path / "bare", lambda t: {n.removeprefix("model."): v for n, v in t.items()})
    old = changed(
        whole,
        tmp_path / "old",
        lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)},
        sharded=sharded,
    )
    half = changed(whole, tmp_path / "half", lambda t: {n: v.half() for n, v in t.items()}, sharded=sharded)
    for folder in (*same, bare, old, half):
        assert held(folder) is None, folder
    load_base(bare, device=CPU, dtype=torch.bfloat16)


def test_experts_that_are_put_together_are_counted_one_by_one(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=50, num_key_value_heads=1, num_local_experts=4, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    held(tmp_path / "moe")

    names = [name for name in headers_of(tmp_path / "moe") if "layers.1." in name and ".experts." in name]
    for number, lost in enumerate([".experts.3.", ".experts."]):
        folder = changed(tmp_path / "moe", tmp_path / f"lost-{number}", without(f"layers.1.block_sparse_moe{lost}"))
        assert len(headers_of(folder)) < len(headers_of(tmp_path / "moe")), names
        with pytest.raises(DataError, match=r"layers\.1\.mlp\.experts|cannot be put together"):
            held(folder)


def test_a_section_of_4_bits_that_somebody_left_over_changes_nothing(whole, tmp_path):
    folder = config_with(
        shutil.copytree(whole, tmp_path / "merged"),
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    )
    assert held(folder) is None
    one, other = (load_base(each, device=CPU, dtype=torch.bfloat16).state_dict() for each in (whole, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)
