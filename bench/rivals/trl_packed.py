"""TRL at its best: examples packed best-fit and flattened, nothing recomputed, Liger's kernels, fused AdamW.

    pip install trl==1.15.0 liger-kernel==0.8.5
    python -m bench.rivals.trl_packed --base FOLDER --train TRAIN.jsonl --text TEMPLATE [--rows 4] [--row-tokens 4096]

Attention over a flattened batch is ours to bring (`bench.rivals.varlen`). There is no adapter on the head: TRL's loss
reads the head's own weight, and would pass it by.
"""

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from bench.rivals import varlen
from bench.rivals.timing import StepTimer
from bench.rivals.workload import adapter, arguments, load_base, texts, training


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4, help="packed rows of a step")
    parser.add_argument("--row-tokens", type=int, default=4096)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    varlen.register()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    tokenizer.pad_token = tokenizer.eos_token  # never used: rows are flattened
    settings = training(
        options,
        per_device_train_batch_size=options.rows,
        max_length=options.row_tokens,
        packing=True,
        packing_strategy="bfd",
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        use_liger_kernel=on_gpu,
    )
    trainer = SFTTrainer(
        model=load_base(options, attention=varlen.NAME),
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_dict({"text": texts(options)}),
        processing_class=tokenizer,
        peft_config=adapter(),
    )
    trainer.data_collator = varlen.with_bounds(trainer.data_collator)
    timer = StepTimer(warm_up=options.warm_up)
    timer.attach(trainer)
    trainer.train()
    timer.report(trainer.model, ("trl", "transformers", "peft", *(["liger-kernel"] if on_gpu else [])))


if __name__ == "__main__":
    main()
