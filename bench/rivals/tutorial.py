"""The QLoRA tutorial for Llama 2 as it is written: two examples a step, padded to 512, recomputing everything.

python -m bench.rivals.tutorial --base FOLDER --train TRAIN.jsonl --text TEMPLATE

Needs what the project needs. The adapter is on the head too, with dropout 0.05; paged 8-bit AdamW.
"""

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import Trainer, TrainingArguments

from bench.rivals.timing import StepTimer
from bench.rivals.workload import adapter, arguments, encoded, load_base, padded, training


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    model = load_base(options)
    model.gradient_checkpointing_enable()
    model = get_peft_model(prepare_model_for_kbit_training(model), adapter(dropout=0.05, head=True))
    settings = training(
        options,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        learning_rate=2.5e-5,
        optim="paged_adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=encoded(options),
        data_collator=lambda examples: padded(examples, width=512, left=True),
    )
    timer = StepTimer(warm_up=options.warm_up, together=5)
    timer.attach(trainer)
    trainer.train()
    timer.report(model, ("transformers", "peft", "bitsandbytes"))


if __name__ == "__main__":
    main()
