"""A real model, tuned and merged, in an engine that is not transformers: the same tokens.

    python -m pip install ctranslate2
    SMOLLM2_FOLDER=FOLDER python -m pytest tests/run/test_second_engine.py -rs

FOLDER has SmolLM2-135M-Instruct: config.json, tokenizer and weights in safetensors.
"""

import importlib.util
import os
import random
from pathlib import Path

import pytest
import torch
from job_process import Job, call, write_lines
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = os.environ.get("SMOLLM2_FOLDER")
pytestmark = [
    pytest.mark.skipif(FOLDER is None, reason="SMOLLM2_FOLDER names no folder with SmolLM2-135M-Instruct"),
    pytest.mark.skipif(importlib.util.find_spec("ctranslate2") is None, reason="ctranslate2 is not installed"),
]
TOKENS = 20
NEAR = 0.05
"""Nats between the first and the second choice that another order of sums may turn round."""
OTHERS = (
    *("What is the capital of France?", "Count from one to ten.", "Write a line about the sea."),
    *("Name three fruits.", "Why is the sky blue?"),
)


def orders(count, seed):
    draw = random.Random(seed)
    things, places = ("hats", "lamps", "cups", "pens", "coats"), ("Oslo", "Rome", "Lima", "Kyoto", "Cairo")
    rows = []
    for _ in range(count):
        number, thing, place = draw.randint(2, 9), draw.choice(things), draw.choice(places)
        asked, said = f"Please send {number} {thing} to {place}.", f"{number} | {thing} | {place}"
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
    return rows


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The finished run, and its merged model."""
    folder = tmp_path_factory.mktemp("smollm2")
    job = Job(folder, Path(FOLDER))
    write_lines(job.data / "train.jsonl", orders(96, 0))
    write_lines(job.data / "validation.jsonl", orders(16, 1))
    job.recipe["data"] |= {"prompt": None, "completion": None, "chat": "messages"}
    job.recipe["lora"] = {"r": 8, "alpha": 16, "targets": "all-linear"}
    job.recipe["train"] = {"steps": 12, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 2}
    job.recipe["evaluate"] = {"every_steps": 12, "prompts": [], "answers": 0}
    ended = job.call("run")
    assert ended.code == 0, ended.stdout[-2000:]
    words = ("--workdir", str(job.workdir), "--device", "cpu", "--onto", "quantised")
    ended = call("export", f"file://{job.only_run()}", "--to", str(folder / "merged"), *words)
    assert ended.code == 0, ended.stdout[-2000:]
    return job, folder / "merged"


def prompts(tokenizer):
    asked = [row["messages"][0]["content"] for row in orders(5, 2)]
    for text in (*asked, *OTHERS):
        chat = [{"role": "user", "content": text}]
        yield tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def greedy(model, ids):
    out = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_a_second_engine_writes_the_same_tokens(tuned, tmp_path):
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    _, merged = tuned
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    TransformersConverter(str(merged)).convert(str(tmp_path / "converted"))
    ends = ours.generation_config.eos_token_id
    theirs = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32")
    for ids in prompts(tokenizer):
        wanted = greedy(ours, ids)
        found = theirs.generate_batch(
            [tokenizer.convert_ids_to_tokens(ids)],
            max_length=TOKENS,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=ends if isinstance(ends, list) else [ends],
            return_end_token=True,
        )[0].sequences_ids[0]
        if found != wanted:
            same = next(n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b)
            with torch.no_grad():
                logits = ours(torch.tensor([[*ids, *wanted[:same]]])).logits[0, -1]
            assert float(logits[wanted[same]] - logits[found[same]]) < NEAR, tokenizer.decode(ids)


def test_the_adapter_loads_in_plain_peft(tuned):
    job, merged = tuned
    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, job.only_run() / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = next(prompts(tokenizer))

    assert tokenizer.decode(greedy(adapted, ids), skip_special_tokens=True).count(" | ") == 2
