"""transformers' Trainer, tuned: padded in groups of like length, nothing recomputed, Liger's kernels, fused AdamW.

    pip install liger-kernel==0.8.5
    python -m bench.rivals.hf_tuned --base FOLDER --train TRAIN.jsonl --text TEMPLATE [--batch 32]

Liger's loss leaves out an adapter on the head without a word, so there is none.
"""

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from bench.rivals.timing import StepTimer
from bench.rivals.workload import adapter, arguments, encoded, load_base, padded, training


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="examples of a step")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    model = get_peft_model(load_base(options), adapter())
    settings = training(
        options,
        per_device_train_batch_size=options.batch,
        optim="adamw_torch_fused",
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length",
        use_liger_kernel=on_gpu,
        dataloader_num_workers=2 if on_gpu else 0,
    )
    trainer = Trainer(
        model=model, args=TrainingArguments(**settings), train_dataset=encoded(options), data_collator=padded
    )
    timer = StepTimer(warm_up=options.warm_up)
    timer.attach(trainer)
    trainer.train()
    timer.report(model, ("transformers", "peft", "bitsandbytes", *(["liger-kernel"] if on_gpu else [])))


if __name__ == "__main__":
    main()
