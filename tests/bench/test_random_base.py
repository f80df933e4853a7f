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


@pytest.mark.parametrize(
    ("shape", "billions"), [("llama2-7b", 6.738), ("mistral-7b", 7.248), ("qwen3-8b", 8.191), ("gemma3-12b", 12.187)]
)
def test_shapes_are_those_of_the_models(shape, billions):
    assert shape in SHAPES
    files, _ = files_of(config_of(shape))

    assert sum(size.numel() for file in files for size in file.values()) / 1e9 == pytest.approx(billions, abs=6e-4)
