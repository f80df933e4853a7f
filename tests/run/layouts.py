"""Bases as people publish them, right and wrong, written by the tests: a tiny model, and what was done to its files."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def changed(source, folder, change, *, sharded=False):
    """A copy of a base with other tensors in it: in one file, or a file for each layer and an index."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = tensors_of(source)
    tensors = change(tensors) or tensors
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if not sharded:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {name: f"model-{name.split('.')[2] if '.layers.' in name else 'x'}.safetensors" for name in tensors}
    for file in {*places.values()}:
        save_file({n: t for n, t in tensors.items() if places[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def config_with(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def without(*parts):
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def prefixed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def in_fp8(block):
    """Weights in fp8 with a scale a block, or a tensor, as DeepSeek's and Qwen's, or NVIDIA's releases have them."""

    def change(tensors):
        made = {}
        for name, value in tensors.items():
            if not name.endswith("proj.weight"):
                made[name] = value
                continue
            scale = value.abs().amax().float() / 448
            made[name] = (value / scale).to(torch.float8_e4m3fn)
            if block:
                sides = [-(-side // block) for side in value.shape]
                made[f"{name}_scale_inv"] = scale.expand(*sides).clone()
            else:
                made[f"{name.removesuffix('weight')}weight_scale"] = scale
                made[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(1.0)
        return made

    return change


def one(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name].clone())

    return apply


def spoilt(value):
    def change(tensor):
        tensor.view(-1)[5] = value
        return tensor

    return change


def bnb4_base(source: Path, folder: Path, *, dtype=torch.bfloat16, **options) -> Path:
    """A base in 4 bits of bitsandbytes, as transformers publishes it."""
    form = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=form, dtype=dtype, device_map={"": "cpu"})
    weights = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(source, folder, ignore=weights)
    model.save_pretrained(folder)
    return folder
