"""A real model, tuned and merged, in an engine that is not transformers: the same tokens.

    make test-second-engine SMOLLM2_FOLDER=FOLDER

FOLDER has SmolLM2-135M-Instruct: config.json, tokenizer and weights in safetensors. CTranslate2 is installed beside our
own packages; without it the adapter is held to plain PEFT alone.
"""

import importlib.util
import os
import random
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from job_process import Job, call, write_lines
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

FOLDER = os.environ.get("SMOLLM2_FOLDER") or None
pytestmark = pytest.mark.skipif(FOLDER is None, reason="SMOLLM2_FOLDER names no folder with SmolLM2-135M-Instruct")
TOKENS = 20
NEAR = 0.05
"""Nats between the first and the second choice that another order of sums may turn round."""
OF_TEN = 6
"""Prompts, at least, that are answered by the same tokens though merged weights are rounded to bf16."""
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


def unrounded(adapted):
    """What the adapter and its base in 4 bits, which is dequantised to bf16, are together: a model in fp32."""
    plain = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    held = dict(adapted.get_base_model().named_modules())
    for name, module in plain.named_modules():
        packed = getattr(held[name], "base_layer", None)
        if isinstance(packed, Linear4bit):
            weights = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
            assert weights.dtype == torch.bfloat16
            module.weight.data.copy_(weights.float() + held[name].get_delta_weight("default"))
    return plain


def same_or_near(ours, ids, wanted, found, *, near=NEAR):
    """Whether the tokens are the same up to a place at which two of them are as good as equal for `ours`."""
    if found == wanted:
        return True
    same = next((n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    if same is None:
        return False  # one of them ended early
    with torch.no_grad():
        logits = ours(torch.tensor([[*ids, *wanted[:same]]])).logits[0, -1]
    return float(logits[wanted[same]] - logits[found[same]]) < near


@pytest.fixture(scope="module")
def asked(tuned):
    """The merged model in transformers, its tokenizer, and what it writes: prompts and tokens."""
    _, merged = tuned
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    return ours, tokenizer, [(ids, greedy(ours, ids)) for ids in prompts(tokenizer)]


@pytest.mark.skipif(importlib.util.find_spec("ctranslate2") is None, reason="ctranslate2 is not installed")
def test_a_second_engine_writes_the_same_tokens(tuned, asked, tmp_path):
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    _, merged = tuned
    ours, tokenizer, answers = asked
    TransformersConverter(str(merged)).convert(str(tmp_path / "converted"))
    ends = ours.generation_config.eos_token_id
    theirs = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32")
    for ids, wanted in answers:
        found = theirs.generate_batch(
            [tokenizer.convert_ids_to_tokens(ids)],
            max_length=TOKENS,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=ends if isinstance(ends, list) else [ends],
            return_end_token=True,
        )[0].sequences_ids[0]
        assert same_or_near(ours, ids, wanted, found), tokenizer.decode(ids)


def test_the_adapter_in_plain_peft_writes_what_the_merged_model_does(tuned, asked):
    """Beside the base in 4 bits, on which it was trained and onto which it was merged; computed in fp32.

    What the tokens differ by is explained: merged weights are those of the two together, each rounded to bf16.
    """
    job, _ = tuned
    ours, tokenizer, answers = asked
    in_nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16, quantization_config=in_nf4)
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    adapted = PeftModel.from_pretrained(base, job.only_run() / "adapter").eval()
    for module in adapted.modules():
        module.support_avx512bf16_for_cpu = False  # else bitsandbytes repacks the weights for bf16
    adapted.generation_config = ours.generation_config
    whole = unrounded(adapted)
    whole.generation_config = ours.generation_config

    assert len(answers) == 10
    assert sum(tokenizer.decode(wanted).count(" | ") == 2 for _, wanted in answers) >= 4, "it was taught something"
    same = 0
    for ids, wanted in answers:
        found = greedy(adapted, ids)
        assert same_or_near(whole, ids, greedy(whole, ids), found), tokenizer.decode(ids)
        same += found == wanted
    merged = dict(ours.named_parameters())
    for name, parameter in whole.named_parameters():
        assert torch.equal(merged[name], parameter.bfloat16().float()), name
    assert same >= OF_TEN
