"""Adapters that were moved off zero, merged by this job's code and by PEFT's own."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import CPU
from transformers import AutoModelForCausalLM

from job.tune.loop.checkpoint import ADAPTER_FILES
from job.tune.merging.preparing import prepare_merge


def moved(model, *, by=0.05):
    """lora_B is not zero, as it is after some steps."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * by)
    return model


def adapted(base, config, *, kind=AutoModelForCausalLM, dtype=torch.float32):
    """A base with an adapter of PEFT's on it."""
    return moved(get_peft_model(kind.from_pretrained(base, dtype=dtype), config)).eval()


def lora(targets=("q_proj", "down_proj"), **options):
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": targets, "task_type": "CAUSAL_LM", **options})


def save_adapter(model, folder) -> Path:
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merge(base, adapter, folder, *, onto="weights"):
    """The weights that an export writes, and the rest of the base's files as they are."""
    prepared = prepare_merge(base, *(adapter / name for name in ADAPTER_FILES), onto=onto, device=CPU)
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if not path.name.startswith("model"):
            (folder / path.name).write_bytes(path.read_bytes())
    for name, make in prepared.weights.files():
        (folder / name).write_bytes(b"".join(make()))
    return prepared
