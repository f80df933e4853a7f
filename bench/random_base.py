"""A base of a known shape with random weights: speed and memory do not depend on what the weights are.

    python -m bench.random_base SHAPE FOLDER --tokenizer FOLDER

Writes bf16 safetensors, one file a layer, several at a time, and copies the tokenizer beside them. Weights are drawn on
the GPU where there is one; the host holds as many layers as there are writers. The files stay in the page cache.
"""

import argparse
import json
import os
import shutil
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

WRITERS = 8
SPREAD = 0.02
"""Standard deviation of every matrix: transformers' own start (initializer_range)."""
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
    # google/gemma-3-12b-it: its text decoder is trained, the rest stays in the files
    "gemma3-12b": {
        "model_type": "gemma3",
        "tie_word_embeddings": True,
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
            "query_pre_attn_scalar": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "vision_use_head": False,
            "patch_size": 14,
        },
    },
    "tiny-llama": {"model_type": "llama", **_TINY},
    "tiny-mistral": {"model_type": "mistral", "sliding_window": None, **_TINY},
    "tiny-qwen3": {"model_type": "qwen3", **_TINY},
}


def config_of(shape):
    """The config of a shape; an output layer of its own if nothing else is said, the Llama-2 tokenizer's tokens."""
    own = {"tie_word_embeddings": False, **SHAPES[shape]}
    return AutoConfig.for_model(own.pop("model_type"), **own, bos_token_id=1, eos_token_id=2, dtype="bfloat16")


def files_of(config):
    """What goes into each file: a layer, or a module outside the layers; each a dict of names and shapes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files = defaultdict(dict)
    for name, tensor in model.named_parameters():  # a tied one once
        place = name.split(".layers.")
        files[place[1].partition(".")[0] if len(place) > 1 else name][name] = tensor.shape
    return list(files.values()), type(model).__name__


def write_file(path, shapes, *, seed, device):
    """Draw tensors and write them: norms are ones, everything else is normal; returns their bytes."""
    chance = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        drawn = tensor.fill_(1.0) if len(shape) == 1 else tensor.normal_(std=SPREAD, generator=chance)
        tensors[name] = drawn.cpu()
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())


def write_base(shape, folder, tokenizer):
    """Write the whole base; returns its bytes."""
    folder.mkdir(parents=True)
    config = config_of(shape)
    files, config.architectures = (found := files_of(config))[0], [found[1]]
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1)) as pool:
        sizes = list(
            pool.map(
                lambda work: write_file(folder / work[1], work[2], seed=work[0], device=device),
                zip(range(len(files)), names, files, strict=True),
            )
        )
    index = {tensor: name for name, shapes in zip(names, files, strict=True) for tensor in shapes}
    content = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))
    config.save_pretrained(folder)
    for path in tokenizer.iterdir():
        if "token" in path.name or path.name in {"vocab.json", "merges.txt"}:
            shutil.copy(path, folder)
    return sum(sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    began = time.perf_counter()
    size = write_base(options.shape, options.folder, options.tokenizer)
    print(f"{options.folder}: {options.shape}, {size / 1e9:.1f} GB in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
