"""The same batches as a run, through a plain transformers + peft loop: do both end at the same validation loss?

    python -m bench.plain_loop REPORT.json BASE_FOLDER TRAIN.jsonl VALIDATION.jsonl

Reads what to do from the run's report (prompt and completion templates, steps, rate, batch order), but shares no line
with the job beyond the order of the examples.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from bench import plain
from job.core.plan.course import plan_course


def encode(path, report, tokenizer):
    """(token ids, length of the prompt) of each line that has a target left."""
    templates, limit = report["recipe"]["data"], report["data"]["max_length"]
    for line in Path(path).read_text().split("\n"):
        if line.strip():
            prompt, answer = (templates[key].format(**json.loads(line)) for key in ("prompt", "completion"))
            start = len(tokenizer(prompt).input_ids)
            ids = [*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id][:limit]
            if len(ids) > start:
                yield ids, start


def main():
    """Train, evaluate, compare."""
    report_path, base, train_path, validation_path = sys.argv[1:]
    report = json.loads(Path(report_path).read_text())
    train, lora = report["recipe"]["train"], report["recipe"]["lora"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples, held_out = (list(encode(path, report, tokenizer)) for path in (train_path, validation_path))
    course = plan_course(
        examples=len(examples), batch_size=train["batch_size"], steps=train["steps"], epochs=None, seed=train["seed"]
    )
    model = plain.load_base(base)
    torch.manual_seed(train["seed"])
    model = get_peft_model(model, LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules=lora["targets"]))
    settings = {key: train[key] for key in ("steps", "learning_rate", "warmup_steps", "max_grad_norm")}
    batches = ([examples[i] for i in course.batch(step)] for step in range(1, train["steps"] + 1))
    for step, loss in enumerate(plain.train(model, batches, **settings), 1):
        if step % 20 == 0:
            print(f"step {step} of {train['steps']}: loss {loss:.4f}", flush=True)
    model.eval()
    for module in model.modules():  # bitsandbytes repacks its weights in eval mode on some CPUs
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        found = torch.cat([plain.losses(model, held_out[i : i + 8]) for i in range(0, len(held_out), 8)])
    ours = report["evaluations"][-1]
    difference = abs(float(found.mean()) - ours["loss"])
    print(
        f"plain loop {float(found.mean()):.4f} on {len(found)} targets, the job {ours['loss']:.4f} on "
        f"{ours['tokens']}, difference {difference:.4f}"
    )
    return 0 if difference <= 0.03 and len(found) == ours["tokens"] else 1


if __name__ == "__main__":
    sys.exit(main())
