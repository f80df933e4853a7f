"""A base of a known shape with random weights: speed and memory do not depend on what the weights are.

    python -m bench.random_base SHAPE FOLDER --tokenizer FOLDER [--form bnb4|mxfp4|unsloth]

Writes bf16 safetensors, one file a layer, several at a time, and copies the tokenizer beside them; with `--form bnb4`
the layers' matrices in 4 bits, as bitsandbytes' own checkpoints hold them, and experts as the product's own copies do,
for bases whose bf16 weights fit no disk; with `--form mxfp4` experts in MXFP4, as gpt-oss is published; with `--form
unsloth` a mixture as Unsloth's own uploads in 4 bits hold it (`bench.rivals.unsloth_form`).
Weights are drawn on the GPU where there is one; the host holds as many layers as there are writers. The files stay in
the page cache.
"""

import argparse
import json
import os
import re
import shutil
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
)

from bench.rivals import unsloth_form
from job.core.base.mxfp4 import BLOCKS, SCALES
from job.tune.model.experts import as_tensors, quantised_one_by_one
from job.tune.model.mixtures import experts_modules, weights_of_experts

WRITERS = 8
MXFP4_SCALE = 120
"""2^-7: times numbers of 4 bits, all of them as often, a standard deviation of 0.023."""
SPREAD = 0.02
"""Standard deviation of a matrix: transformers' own start (initializer_range)."""
_DEEP, _BACK = 64, ("o_proj.weight", "down_proj.weight")
"""From that many layers on, what a layer adds to what it got is drawn smaller, by GPT-2's sqrt(2 x layers): a last bit
would otherwise be half of a gradient 80 layers later, which is true of no trained base."""
_TINY = {
    "vocab_size": 32000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
_LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_IN_MXFP4 = {"gpt_oss"}
"""Model types that are published with their experts in MXFP4."""
_TIED = {"gemma3"}
"""Model types whose head is their embedding; the others have one of their own."""
_NORMS_ADD_ONE = {"gemma3", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"}
"""Model types whose norms scale by one more than their weight. With ones, queries and keys would be twice as long, and
attention so sharp that rounding alone moves a token's loss by 2 %."""
_NO_NORMS = ("_proj.bias", "router.bias", "sinks", "A_log", "dt_bias", "_proj_bias")
"""Ends of the names of vectors that are drawn like matrices; ..."""
_PLAIN_NORMS = ("linear_attn.norm.weight",)
"""... and of norms that scale by their weight in every model."""
_BESIDE_TEXT = ("vision_tower", "multi_modal_projector", "visual")
"""Modules of whole models that stay in 16 bits, as the head does."""
_TINY_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
_TINY_TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "patch_size": 14,
    "num_position_embeddings": 16,
}
_QWEN3_5_ROPE = {
    "rope_type": "default",
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
    "mrope_interleaved": True,
}
SHAPES = {
    # meta-llama/Llama-2-7b-hf, mistralai/Mistral-7B-v0.3 and Qwen/Qwen3-8B: their config.json
    "llama2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    # meta-llama/Llama-2-70b-hf: its config.json
    "llama2-70b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    # meta-llama/Llama-3.1-8B, meta-llama/Llama-3.1-70B and microsoft/phi-4: their config.json
    "llama3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA_3_ROPE,
    },
    "llama3.1-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _LLAMA_3_ROPE,
    },
    "phi4-14b": {
        "model_type": "phi3",
        "vocab_size": 100352,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0, "partial_rotary_factor": 1.0},
    },
    # google/gemma-3-12b-it and mistralai/Ministral-3-8B-Base-2512: their config.json, with the vision tower
    "gemma3-12b": {
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": {
            "vocab_size": 262208,
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "sliding_window": 1024,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "ministral3-8b": {
        "model_type": "mistral3",
        "text_config": {
            "model_type": "ministral3",
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 34,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "head_dim": 64,
            "image_size": 1540,
            "patch_size": 14,
        },
    },
    # openai/gpt-oss-20b and Qwen/Qwen3-30B-A3B: their config.json
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rope_parameters": _GPT_OSS_ROPE,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    # Qwen/Qwen3.5-9B and Qwen/Qwen3.5-35B-A3B: their config.json, with the vision tower; sizes that are not here are
    # transformers' own, which are theirs
    "qwen3.5-9b": {
        "model_type": "qwen3_5",
        "text_config": {"max_position_embeddings": 262144, "rope_parameters": _QWEN3_5_ROPE},
        "vision_config": {"out_hidden_size": 4096},
    },
    "qwen3.5-35b-a3b": {
        "model_type": "qwen3_5_moe",
        "text_config": {"max_position_embeddings": 262144, "rope_parameters": _QWEN3_5_ROPE},
        "vision_config": {"out_hidden_size": 2048},
    },
    "tiny-qwen3.5": {
        "model_type": "qwen3_5",
        "text_config": {**_TINY, **_TINY_DELTA},
        "vision_config": _TINY_TOWER,
    },
    "tiny-qwen3.5-moe": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            **{name: size for name, size in _TINY.items() if name != "intermediate_size"},
            **_TINY_DELTA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
        "vision_config": _TINY_TOWER,
    },
    "tiny-llama": {"model_type": "llama", **_TINY},
    "tiny-mistral": {"model_type": "mistral", "sliding_window": None, **_TINY},
    "tiny-qwen3": {"model_type": "qwen3", **_TINY},
    "tiny-gpt-oss": {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, **_TINY},
    "tiny-qwen3-moe": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        **_TINY,
    },
    "tiny-gemma3": {
        "model_type": "gemma3",
        "mm_tokens_per_image": 4,
        "text_config": _TINY | {"sliding_window": 32},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "vision_use_head": False,
        },
    },
}


def config_of(shape):
    """The config of a shape, with the Llama-2 tokenizer's special tokens."""
    own = dict(SHAPES[shape])
    kind = own.pop("model_type")
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **own, **tokens, tie_word_embeddings=kind in _TIED, dtype="bfloat16")
    text = config.get_text_config()
    text.bos_token_id, text.eos_token_id, text.tie_word_embeddings = 1, 2, config.tie_word_embeddings
    return config


def model_of(config):
    """The whole model on the meta device, as it is published: with its vision tower, where it has one."""
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def files_of(config):
    """What goes into each file: a layer, or a module outside the layers; each a dict of names and shapes."""
    model = model_of(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    files = defaultdict(dict)
    for name, tensor in model.state_dict().items():
        layer = re.match(r".*?\.(layers|blocks)\.\d+\.", name)
        if name not in tied:
            files[layer[0] if layer else name][name] = tensor.shape
    return list(files.values()), type(model).__name__


def four_bit_weights(config):
    """Names of the matrices that bitsandbytes' checkpoints hold in 4 bits: the text decoder's layers."""
    modules = model_of(config).named_modules()
    linear = [name for name, module in modules if isinstance(module, nn.Linear) and not name.endswith("lm_head")]
    return {f"{name}.weight" for name in linear if not {*name.split(".")} & {*_BESIDE_TEXT}}


def expert_weights(config):
    """Names of the stacks of experts, and whether the model has each expert's matrix transposed."""
    found = experts_modules(model_of(config))
    return {f"{path}.{name}": module.is_transposed for path, module in found for name in weights_of_experts(module)}


def experts_in_nf4(name, shape, *, transposed, device, chance):
    """A stack of experts as the product's copies hold it, drawn and quantised one at a time."""
    count, *sides = shape
    height, width = reversed(sides) if transposed else sides

    def matrices():
        for _ in range(count):
            matrix = torch.empty(height, width, dtype=torch.bfloat16, device=device)
            yield matrix.normal_(std=SPREAD, generator=chance)

    return as_tensors(quantised_one_by_one(matrices(), count), name)


def experts_as_unsloth_has_them(name, shape, *, transposed, device, chance):
    """The same in the form of Unsloth's uploads."""
    stack = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=SPREAD, generator=chance)
    return unsloth_form.experts(name, stack.transpose(1, 2) if transposed else stack, one_by_one=transposed)


def experts_in_mxfp4(name, shape, *, device, chance):
    """The same as gpt-oss has it, [experts, in, out]: bytes at random under one scale."""
    count, width, height = shape
    blocks = torch.randint(0, 256, (count, height, width // 32, 16), generator=chance, device=device)
    scales = torch.full(blocks.shape[:-1], MXFP4_SCALE, dtype=torch.uint8)
    return {f"{name}{BLOCKS}": blocks.to(torch.uint8), f"{name}{SCALES}": scales}


def write_file(  # noqa: PLR0913 - what a base's tensors are drawn by
    path, shapes, *, seed, device, norms=1.0, in_four_bits=frozenset(), experts=None, form="bf16", back=1.0
):
    """Draw tensors and write them: norms have one value, everything else is normal; returns their bytes."""
    chance = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if form != "bf16" and name in (experts or {}):
            how = {"device": device, "chance": chance}
            if form != "mxfp4":
                how["transposed"] = experts[name]
            forms = {"bnb4": experts_in_nf4, "mxfp4": experts_in_mxfp4, "unsloth": experts_as_unsloth_has_them}
            parts = forms[form](name, shape, **how)
            tensors |= {part: each.cpu() for part, each in parts.items()}
            continue
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        one_value = len(shape) == 1 and not name.endswith(_NO_NORMS)
        value = 1.0 if name.endswith(_PLAIN_NORMS) else norms
        spread = SPREAD * back if name.endswith(_BACK) else SPREAD
        drawn = tensor.fill_(value) if one_value else tensor.normal_(std=spread, generator=chance)
        if name in in_four_bits:
            tensors |= {part: each.cpu() for part, each in unsloth_form.packed(name, drawn).items()}
        else:
            tensors |= unsloth_form.beside(name, drawn.cpu()) if form == "unsloth" else {name: drawn.cpu()}
    save_file(tensors, path, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def write_base(shape, folder, tokenizer, *, form="bf16"):
    """Write the whole base; returns its bytes."""
    folder.mkdir(parents=True)
    config = config_of(shape)
    if form == "unsloth":
        config = unsloth_form.text_alone(config)
    files, config.architectures = (found := files_of(config))[0], [found[1]]
    in_four_bits, experts = frozenset(), expert_weights(config)
    if form == "mxfp4":
        if config.model_type not in _IN_MXFP4:
            raise SystemExit(f"{shape}: --form mxfp4 is how {', '.join(_IN_MXFP4)} is published, and nothing else")
        config.quantization_config = {"quant_method": "mxfp4"}
    if form in {"bnb4", "unsloth"}:
        in_four_bits = four_bit_weights(config)
        config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
            llm_int8_skip_modules=["lm_head", *_BESIDE_TEXT],
        ).to_dict()
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    norms = 0.0 if config.model_type in _NORMS_ADD_ONE else 1.0
    layers = config.get_text_config().num_hidden_layers
    back = 1.0 if layers < _DEEP else (2 * layers) ** -0.5

    def write(work):
        seed, name, shapes = work
        options = {"in_four_bits": in_four_bits, "experts": experts, "form": form, "back": back}
        return write_file(folder / name, shapes, seed=seed, device=device, norms=norms, **options)

    with ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1)) as pool:
        written = list(pool.map(write, zip(range(len(files)), names, files, strict=True)))
    index = {tensor: name for name, sizes in zip(names, written, strict=True) for tensor in sizes}
    total = sum(size for sizes in written for size in sizes.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))
    config.save_pretrained(folder)
    for path in tokenizer.iterdir():
        if "token" in path.name or path.name in {"vocab.json", "merges.txt"}:
            shutil.copy(path, folder)
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--form", choices=["bf16", "bnb4", "mxfp4", "unsloth"], default="bf16")
    options = parser.parse_args()
    began = time.perf_counter()
    size = write_base(options.shape, options.folder, options.tokenizer, form=options.form)
    print(f"{options.folder}: {options.shape}, {size / 1e9:.1f} GB in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
