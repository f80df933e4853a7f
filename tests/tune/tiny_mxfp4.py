"""A tiny gpt-oss as it is published: experts in MXFP4, all else in bf16; and the same decoded by transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_families import write_family
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

SECTION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""What gpt-oss's config.json has."""
EXPERTS = ("gate_up_proj", "down_proj")


def write_mxfp4(folder: Path, *, decoded: Path | None = None) -> Path:
    """Blocks at random, with scales that give numbers of a usual size; `decoded` gets the base in bf16."""
    write_family(folder, "gpt_oss")
    path = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    torch.manual_seed(3)
    plain = {}
    for name in [name for name in tensors if name.endswith(EXPERTS)]:
        experts, inner, height = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, height, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(121, 125, blocks.shape[:-1], dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if decoded is not None:
        decoded.mkdir()
        (decoded / "config.json").write_text(json.dumps(config))
        others = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_blocks", "_scales"))}
        save_file(others | plain, decoded / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SECTION}))
    return folder
