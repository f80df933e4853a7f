"""Unsloth: padding-free batches as it is installed, or packed rows with nothing recomputed and torch's own kernel.

    pip install unsloth==2026.10.9 unsloth_zoo==2026.10.9 trl==1.15.0 datasets==4.8.5
    python -m bench.rivals.unsloth_sft --base FOLDER --train TRAIN.jsonl --text TEMPLATE [--rows 32] [--row-tokens N]
        [--targets NAME,NAME] [--keep-activations] [--varlen]

With --row-tokens examples are packed into rows of that many tokens; without, --rows examples make a step. It has no
LoRA on the head here, as in its own notebooks.
"""

import os
import sys
import tempfile

from bench.rivals.unsloth_varlen import give_varlen

os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"  # it would ask the hub
os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp()
if "--varlen" in sys.argv:
    give_varlen()

import unsloth  # noqa: F401, I001 - before everything that it patches
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from unsloth import FastLanguageModel

from bench.rivals.timing import StepTimer
from bench.rivals.workload import PROJECTIONS, RANK, arguments, texts, training


def load(options, length):
    """Base and adapter, made by Unsloth."""
    recomputing = False if options.keep_activations else "unsloth"
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(options.base),
        max_seq_length=length,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=recomputing,
        local_files_only=True,
    )
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0,
        bias="none",
        target_modules=options.targets.split(","),
        use_gradient_checkpointing=recomputing,
        random_state=3407,
    )
    return adapted, tokenizer


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32, help="examples, or packed rows, of a step")
    parser.add_argument("--row-tokens", type=int, help="pack into rows of this many tokens")
    parser.add_argument("--targets", default=",".join(PROJECTIONS), help="modules that get an adapter, with commas")
    parser.add_argument("--keep-activations", action="store_true", help="recompute nothing")
    parser.add_argument("--varlen", action="store_true", help="let it see torch's variable-length kernel")
    options = parser.parse_args()
    length = options.row_tokens or options.max_length
    model, tokenizer = load(options, length)
    settings = training(
        options,
        per_device_train_batch_size=options.rows,
        max_length=length,
        packing=options.row_tokens is not None,
        dataset_text_field="text",
        dataset_num_proc=4,
        optim="adamw_8bit",
    )
    dataset = Dataset.from_dict({"text": [text + tokenizer.eos_token for text in texts(options)]})
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=dataset, args=SFTConfig(**settings))
    timer = StepTimer(warm_up=options.warm_up)
    timer.attach(trainer)
    trainer.train()
    timer.report(model, ("unsloth", "unsloth_zoo", "trl", "transformers", "datasets"))


if __name__ == "__main__":
    main()
