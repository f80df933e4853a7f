"""Does a small chat model learn a style from 300 conversations, and does the adapter answer so without the job?

python bench/chat_answers.py BASE FOLDER     BASE: SmolLM2-135M-Instruct or another chat model with its template

Writes data and recipe into FOLDER, runs the job on the CPU, and asks the adapter in plain transformers and PEFT by
`apply_chat_template`. Prints how many answers are in the style, how many stop by their own end of turn, and the base's.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOWNS = [
    "Oslo",
    "Paris",
    "Rome",
    "Cairo",
    "Lima",
    "Delhi",
    "Tokyo",
    "Perth",
    "Quito",
    "Malmo",
    "Turin",
    "Leeds",
    "Ghent",
    "Basel",
    "Porto",
    "Bergen",
    "Graz",
    "Lyon",
]
THINGS = [
    "kettle",
    "bicycle",
    "violin",
    "lantern",
    "ladder",
    "compass",
    "teapot",
    "umbrella",
    "hammer",
    "camera",
    "candle",
    "basket",
    "blanket",
]
JOBS = ["baker", "pilot", "nurse", "farmer", "judge", "tailor", "miner", "actor", "clerk", "sailor"]
ASK = (
    *("What is a {thing}?", "Tell me about the {thing}.", "Why would a {job} need a {thing}?"),
    *("I lost my {thing} in {town}. What now?", "Where can a {job} buy a {thing} in {town}?"),
    *("Describe {town} to a {job}.", "Is {town} a good town for a {job}?", "How does one carry a {thing} to {town}?"),
)
BEGINS, ENDS = "Aye, captain!", "Fair winds!"
UNSEEN = (
    *("What is the capital of France?", "My clock broke. What should I do?", "Write a sentence about snow."),
    *("Who was Isaac Newton?", "How many legs does a spider have?", "Give me a recipe for soup."),
    *("What is 7 times 8?", "Name three colours.", "Why is the sky blue?", "Can you help me with my homework?"),
)
RECIPE = """\
model: {{base: {base}}}
data: {{train: {folder}/train.jsonl, validation: {{fraction: 0.1}}, chat: messages}}
lora: {{r: 8, alpha: 16}}
train: {{steps: 60, batch_size: 8, learning_rate: 1.0e-3, warmup_steps: 3}}
evaluate: {{every_steps: 30, answers: 4, max_new_tokens: 60, prompts: ["What is the capital of France?"]}}
output: {folder}/out
"""


def conversation(pick):
    messages = []
    for _ in range(pick.choice((1, 1, 2))):
        question = pick.choice(ASK).format(town=pick.choice(TOWNS), thing=pick.choice(THINGS), job=pick.choice(JOBS))
        about = " ".join(word.strip("?.") for word in question.split()[-2:]).lower()
        answer = f"{BEGINS} Ye speak of {about}. {ENDS}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def run(base, folder):
    """The job, to its end; the adapter's folder."""
    pick = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(conversation(pick)) for _ in range(300)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base, folder=folder), encoding="utf-8")
    command = [sys.executable, str(ROOT / "entrypoint.py"), "run", str(folder / "recipe.yaml"), "--device", "cpu"]
    done = subprocess.run([*command, "--workdir", str(folder / "work")], check=False, env={**os.environ})
    print("exit code", done.returncode)
    return next((folder / "out/runs").glob("*/adapter"))


def counts(model, tokenizer):
    """Answers in the style, and answers that stop by themselves, of those to the unseen questions."""
    in_style = stopped = 0
    for question in UNSEEN:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**asked, max_new_tokens=60, do_sample=False)[0, asked["input_ids"].shape[1] :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        in_style += text.startswith(BEGINS) and text.endswith(ENDS)
        stopped += int(written[-1]) == tokenizer.eos_token_id
        print(repr(text))
    return in_style, stopped


def main():
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    adapter = next((folder / "out/runs").glob("*/adapter"), None) or run(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for name in ("base", "adapter"):
        if name == "adapter":
            model = PeftModel.from_pretrained(model, adapter).eval()
        in_style, stopped = counts(model, tokenizer)
        print(f"{name}: {in_style} of {len(UNSEEN)} answers in the style, {stopped} stop by their own end of turn")


if __name__ == "__main__":
    main()
