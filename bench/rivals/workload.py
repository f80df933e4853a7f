"""What every rival is given: the texts in one order, the base in 4 bits, an adapter of rank 32 on seven projections."""

import argparse
import json
import random
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 32


def arguments(description):
    """The options that `bench.compare` gives to every rival; each adds its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--train", type=Path, required=True, metavar="FILE")
    parser.add_argument("--text", required=True, help="template over the fields of a record")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of an example")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--warm-up", type=int, default=6, help="steps that do not count")
    return parser


def texts(options):
    """All examples as text, shuffled."""
    lines = options.train.read_text(encoding="utf-8").split("\n")
    found = [options.text.format(**json.loads(line)) for line in lines if line.strip()]
    random.Random(0).shuffle(found)
    return found


def encoded(options):
    """Token ids of all examples, BOS and EOS included."""
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    return [
        {"input_ids": [*ids[: options.max_length - 1], tokenizer.eos_token_id]}
        for ids in tokenizer(texts(options))["input_ids"]
    ]


def load_base(options, attention="sdpa"):
    """NF4, double quantisation, bf16 compute."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.base,
        quantization_config=quantised,
        dtype=torch.bfloat16,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        attn_implementation=attention,
    )
    model.config.use_cache = False
    return model


def adapter(*, dropout=0.0, head=False, targets=PROJECTIONS):
    """peft's config; with Liger's loss and TRL's an adapter on the head would have no part in it."""
    return LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=[*targets, *(["lm_head"] if head else [])],
    )


def training(options, **own):
    """Arguments of a Trainer that all rivals share: bf16, no logging, nothing saved, no tracker; `own` wins."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": options.steps,
        "learning_rate": 1e-4,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
    } | own


def padded(examples, *, width=None, left=False):
    """Pad to `width`, or to the longest in whole eights: input_ids, attention_mask and labels, each [B, S] int64."""
    width = width or -(-max(len(e["input_ids"]) for e in examples) // 8) * 8
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        own = torch.tensor(example["input_ids"])
        place = slice(width - len(own), width) if left else slice(len(own))
        ids[row, place], mask[row, place], labels[row, place] = own, 1, own
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
