"""In which form a base is published, by the headers of its files alone."""

import pytest

from job.core.base.mxfp4 import form_with_experts
from job.core.base.promises import TensorHeader, form_in_files


def packed(name, kind, *, nested):
    parts = ["", ".absmax", ".quant_map", f".quant_state.bitsandbytes__{kind}"]
    parts += [".nested_absmax", ".nested_quant_map"] if nested else []
    return {f"{name}.weight{part}": TensorHeader(dtype="U8", shape=(32, 1)) for part in parts}


@pytest.mark.parametrize(
    ("dtype", "said"), [("BF16", "bf16"), ("F16", "fp16"), ("F32", "fp32"), ("F8_E4M3", "F8_E4M3")]
)
def test_what_most_of_the_bytes_are(dtype, said):
    few = {"norm": TensorHeader(dtype="F64", shape=(8,))}
    assert form_in_files({**few, "a": TensorHeader(dtype=dtype, shape=(64, 64))}, None) == said


def test_each_kind_of_4_bits_is_counted():
    tensors = {
        **packed("layers.0.q_proj", "nf4", nested=True),
        **packed("layers.1.q_proj", "nf4", nested=True),
        **packed("layers.2.q_proj", "fp4", nested=False),
        "lm_head.weight": TensorHeader(dtype="F16", shape=(10**4, 10**3)),
    }
    assert form_in_files(tensors, ["lm_head", "layers.0.k_proj", "layers.1.k_proj"]) == (
        "NF4, double quantisation (2) and FP4, single quantisation (1); 3 linear layers in 4 bits, "
        "3 not (2 k_proj, lm_head)"
    )


def test_experts_in_mxfp4_are_counted_beside_what_all_else_is():
    tensors = {
        f"layers.{layer}.mlp.experts.{kind}_{part}": TensorHeader(dtype="U8", shape=(4, 64, 1000))
        for layer in range(3)
        for kind in ("gate_up_proj", "down_proj")
        for part in ("blocks", "scales")
    }
    others = {"lm_head.weight": TensorHeader(dtype="BF16", shape=(64, 64))}
    assert form_with_experts(tensors | others) == "MXFP4 (6 tensors of experts), all else bf16"
    assert form_with_experts(others) is None


@pytest.mark.parametrize(
    ("dtype", "size"), [("BF16", 12), ("F32", 24), ("F8_E5M2", 6), ("I64", 48), ("U8", 6), ("BOOL", 6)]
)
def test_bytes_of_a_tensor(dtype, size):
    assert TensorHeader(dtype=dtype, shape=(2, 3)).bytes == size
