"""How a base is quantised already: all but bitsandbytes' 4 bits and gpt-oss's own is refused by its name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.core.base.quantisation import four_bits_of, unquantised
from job.core.errors import UsageError

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
SECTIONS = {
    "GPTQ (4 bits)": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "AWQ (4 bits)": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
    "FP8, a scale a block": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "FP8, a scale a tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    "FP8 (FBGEMM)": {"quant_method": "fbgemm_fp8"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "bitsandbytes in 8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    "MXFP4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "GGUF": {"quant_method": "gguf"},
    "NVIDIA ModelOpt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "MLX (4 bits)": {"group_size": 64, "bits": 4},
    "never-heard-of": {"quant_method": "never-heard-of"},
    "an unnamed method": {"something": 1},
}


def of(config, source="someone/model", named=()):
    return four_bits_of(config, source=source, named=named)


@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "quantization", "text_config"])
@pytest.mark.parametrize(("method", "section"), SECTIONS.items(), ids=SECTIONS)
def test_a_foreign_method_is_refused_by_its_name_wherever_the_config_has_it(method, section, place):
    config = {"text_config": {"quantization_config": section}} if place == "text_config" else {place: section}
    with pytest.raises(UsageError) as refusal:
        of(config)
    assert f"someone/model: the weights are quantised already, by {method}, " in str(refusal.value)
    assert "take the unquantised model" in str(refusal.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "FP4, single quantisation, published for float32"),
        (
            {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"},
            "NF4, double quantisation, published for bfloat16",
        ),
        (
            {
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": "float16",
                "llm_int8_skip_modules": ["lm_head", "model.layers.0.self_attn"],
            },
            "NF4, single quantisation, published for float16, 2 modules not in 4 bits",
        ),
    ],
)
def test_four_bits_of_bitsandbytes_are_read_as_what_they_are(more, said):
    assert str(of({"quantization_config": BNB | more})) == said


def test_the_first_configs_of_bitsandbytes_named_no_method():
    section = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert of({"quantization_config": section}).kind == "NF4"


def test_gpt_oss_is_published_in_mxfp4_and_trained():
    assert str(of({"model_type": "gpt_oss", "quantization_config": SECTIONS["MXFP4"]})) == "MXFP4 in its experts"


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_base_that_is_not_quantised_is_nothing(config):
    assert of(config) is None


@pytest.mark.parametrize(
    ("source", "named", "found"),
    [
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", (), ["Qwen/Qwen2.5-7B-Instruct"]),
        ("Qwen/Qwen3-8B-FP8", (), ["Qwen/Qwen3-8B"]),
        ("unsloth/Llama-3.1-8B-unsloth-bnb-8bit", (), ["unsloth/Llama-3.1-8B"]),
        ("someone/model-AWQ", ("meta-llama/Llama-3.1-8B",), ["meta-llama/Llama-3.1-8B", "someone/model"]),
        ("RedHatAI/Qwen3-8B-quantized.w4a16", (), ["RedHatAI/Qwen3-8B"]),
        ("openai/gpt-oss-20b", ("openai/gpt-oss-20b",), []),
        (
            "s3://models/llama-awq",
            ("/home/someone/llama", "a\nb/c", "meta-llama/Llama-3.1-8B"),
            ["meta-llama/Llama-3.1-8B"],
        ),
        ("/models/llama-gptq", ("TheBloke/Llama-GPTQ",), []),
    ],
)
def test_the_unquantised_base_is_suggested_where_something_names_it(source, named, found):
    assert unquantised(source, named) == found
    with pytest.raises(UsageError) as refusal:
        of({"quantization_config": SECTIONS["AWQ (4 bits)"]}, source=source, named=named)
    assert all(each in str(refusal.value) for each in found)
    assert ("may be the model that it was made from" in str(refusal.value)) == bool(found)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["quant_method", "load_in_4bit", "load_in_8bit", "bits", "group_size", "llm_int8_skip_modules", "weight_block_size"]
)


@given(
    section=st.dictionaries(KEYS, VALUES),
    model_type=VALUES,
    named=st.lists(st.text(max_size=20), max_size=3),
    source=st.text(),
)
def test_whatever_strangers_wrote_is_4_bits_or_is_refused(section, model_type, named, source):
    try:
        found = of({"quantization_config": section, "model_type": model_type}, source=source, named=named)
    except UsageError:
        return
    assert (found is None) == (not section)
    assert found is None or section["load_in_4bit"]
