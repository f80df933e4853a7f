"""Multimodal models whose text decoder is trained, each tiny and random with its towers, saved as its whole class."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, SIZES
from transformers import CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_TOWER = {
    "depth": 1,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_EARS = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "output_proj_dims": 32,
    "subsampling_conv_channels": [8, 8],
}
_BESIDE_PICTURES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}


def _text(family: str, **own: Any) -> dict[str, Any]:
    model_type, its = FAMILIES[family]
    return {**SIZES, "pad_token_id": 0, **its, "model_type": model_type, **own}


def _qwen(family: str, model_type: str, **own: Any) -> dict[str, Any]:
    return _text(family, **_BESIDE_PICTURES, model_type=model_type, **own)


def _tower(model_type: str) -> dict[str, Any]:
    return {**_TOWER, "model_type": model_type}


# fmt: off
WRAPPED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # name: transformers' model_type, and its config
    "gemma3": ("gemma3", {"text_config": _text("gemma3_text"), "vision_config": _TOWER, "mm_tokens_per_image": 4}),
    "gemma4": ("gemma4", {"text_config": _text("gemma4_text"), "vision_config": _TOWER, "audio_config": _EARS}),
    "gemma4, experts": (
        "gemma4",
        {"text_config": _text("gemma4_text, experts"), "vision_config": _TOWER, "audio_config": _EARS},
    ),
    "gemma4_unified": (
        "gemma4_unified",
        {"text_config": _text("gemma4_text", model_type="gemma4_unified_text")},
    ),
    "mistral3": (
        "mistral3",
        {"text_config": _text("mistral"), "vision_config": {**_TOWER, "head_dim": 16, "model_type": "pixtral"}},
    ),
    "mistral3, ministral3": (
        "mistral3",
        {"text_config": _text("ministral3"), "vision_config": {**_TOWER, "head_dim": 16, "model_type": "pixtral"}},
    ),
    "qwen2_vl": (
        "qwen2_vl",
        {"text_config": _qwen("qwen2", "qwen2_vl_text"), "vision_config": {**_QWEN_TOWER, "hidden_size": 64}},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": _qwen("qwen2, window", "qwen2_5_vl_text"),
            "vision_config": {**_QWEN_TOWER, "fullatt_block_indexes": [0]},
        },
    ),
    "qwen3_vl": ("qwen3_vl", {"text_config": _qwen("qwen3", "qwen3_vl_text"), "vision_config": _QWEN_TOWER}),
    "qwen3_vl_moe": (
        "qwen3_vl_moe", {"text_config": _qwen("qwen3_moe", "qwen3_vl_moe_text"), "vision_config": _QWEN_TOWER}
    ),
    "qwen3_5": ("qwen3_5", {"text_config": _text("qwen3_5_text"), "vision_config": _QWEN_TOWER}),
    "qwen3_5_moe": ("qwen3_5_moe", {"text_config": _text("qwen3_5_moe_text"), "vision_config": _QWEN_TOWER}),
    "llava": ("llava", {"text_config": _text("llama"), "vision_config": _tower("clip_vision_model")}),
    "llava_next": ("llava_next", {"text_config": _text("mistral"), "vision_config": _tower("clip_vision_model")}),
    "llava_onevision": (
        "llava_onevision", {"text_config": _text("qwen2"), "vision_config": _tower("siglip_vision_model")}
    ),
    "internvl": (
        "internvl",
        {
            "text_config": _text("qwen3"),
            "vision_config": {**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
        },
    ),
    "lfm2_vl": ("lfm2_vl", {"text_config": _text("lfm2"), "vision_config": _tower("siglip2_vision_model")}),
    "smolvlm": ("smolvlm", {"text_config": _text("llama"), "vision_config": _TOWER}),
}
# fmt: on


def whole_config_of(name: str, **own: Any) -> Any:
    """A whole model's."""
    model_type, config = WRAPPED[name]
    config = json.loads(json.dumps(config))
    tied = config["text_config"]["tie_word_embeddings"]
    return CONFIG_MAPPING[model_type](**{"tie_word_embeddings": tied, **config, **own})


def whole_class_of(config: Any) -> Any:
    """The class that its publisher saved it as."""
    return MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]


def write_wrapper(folder: Path, name: str, *, most_bytes: str = "1GB", **own: Any) -> Path:
    """Random weights in bf16, towers and all, with nothing in them that does nothing, as the whole class saves them."""
    torch.manual_seed(7)
    config = whole_config_of(name, **own)
    model = whole_class_of(config)(config)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if bool((parameter == parameter.flatten()[0]).all()):
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().flatten()[0]), std=0.2)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=most_bytes)
    return folder


def in_the_other_layout(folder: Path) -> Path:
    """The same files with the names that the class itself has for its tensors, where it saves others."""
    tensors = load_file(folder / "model.safetensors")
    config = CONFIG_MAPPING[json.loads((folder / "config.json").read_text())["model_type"]].from_pretrained(folder)
    model = whole_class_of(config).from_pretrained(folder, dtype=torch.bfloat16)
    own = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if "lm_head.weight" in {name.removeprefix("language_model.") for name in tensors}:
        own["lm_head.weight"] = model.lm_head.weight
    assert own.keys() != tensors.keys()
    save_file({name: tensor.detach().clone() for name, tensor in own.items()}, folder / "model.safetensors")
    return folder
