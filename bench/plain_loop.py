"""The same batches as a run, through a plain transformers + peft loop: do both end at the same validation loss?

    python -m bench.plain_loop REPORT.json BASE_FOLDER TRAIN.jsonl VALIDATION.jsonl

Reads what to do from the run's report (prompt and completion templates, steps, rate, batch order), but shares no line
with the job beyond the order of the examples: padded batches, Hugging Face's own attention and cross-entropy.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_scheduler

from job.core.plan import plan_course

report_path, base, train_path, validation_path = sys.argv[1:]
report = json.loads(Path(report_path).read_text())
recipe, limit = report["recipe"], report["data"]["max_length"]
tokenizer = AutoTokenizer.from_pretrained(base)


def encode(path):
    """(token ids, length of the prompt) of each line that has a target left."""
    for line in Path(path).read_text().split("\n"):
        if line.strip():
            prompt, answer = (recipe["data"][key].format(**json.loads(line)) for key in ("prompt", "completion"))
            start = len(tokenizer(prompt).input_ids)
            ids = [*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id][:limit]
            if len(ids) > start:
                yield ids, start


def losses(model, batch):
    """Loss of each target of a padded batch."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([[-100] * s + ids[s:] + [-100] * (width - len(ids)) for ids, s in batch])
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")[labels[:, 1:].flatten() >= 0]


def main():
    """Train, evaluate, compare."""
    train, lora = recipe["train"], recipe["lora"]
    examples, held_out = list(encode(train_path)), list(encode(validation_path))
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantised, dtype=torch.bfloat16)
    torch.manual_seed(train["seed"])
    model = get_peft_model(model, LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules=lora["targets"]))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=train["learning_rate"], weight_decay=0.0
    )
    schedule = get_scheduler("linear", optimizer, train["warmup_steps"], train["steps"])
    course = plan_course(
        examples=len(examples), batch_size=train["batch_size"], steps=train["steps"], epochs=None, seed=train["seed"]
    )
    model.train()
    for step in range(1, train["steps"] + 1):
        loss = losses(model, [examples[i] for i in course.batch(step)]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], train["max_grad_norm"])
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step} of {train['steps']}: loss {float(loss):.4f}", flush=True)
    model.eval()
    for module in model.modules():  # bitsandbytes repacks its weights in eval mode on some CPUs
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        found = torch.cat([losses(model, held_out[i : i + 8]) for i in range(0, len(held_out), 8)])
    ours = report["evaluations"][-1]
    difference = abs(float(found.mean()) - ours["loss"])
    print(
        f"plain loop {float(found.mean()):.4f} on {len(found)} targets, the job {ours['loss']:.4f} on "
        f"{ours['tokens']}, difference {difference:.4f}"
    )
    return 0 if difference <= 0.03 and len(found) == ours["tokens"] else 1


if __name__ == "__main__":
    sys.exit(main())
