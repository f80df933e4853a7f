"""transformers and PEFT with a mixture's experts in 4 bits by bitsandbytes' parametrization, which is axolotl's way.

    python -m bench.rivals.parametrized_experts --base FOLDER --train TRAIN.jsonl --text TEMPLATE --targets NAME,NAME

Each layer's stacks are quantised whole and dequantised whenever a layer reads them; transformers' grouped products
multiply them. Layers are recomputed in the backward: kept, the dequantised weights of all layers would be as many as
in 16 bits. Examples are padded in groups of like length. Weights are drawn on the device by the base's config, which
alone is read: the base in 16 bits fits no disk.
"""

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from bench.rivals.timing import StepTimer
from bench.rivals.workload import adapter, arguments, encoded, padded, training

_STACKS = ("gate_up_proj", "down_proj")
_ONLY_EAGER = {"gpt_oss"}
"""Model types whose attention transformers computes with sinks in its plain code alone."""
_LIGER = {"swiglu": False}
"""Its experts are those of transformers 4."""


def drawn_base(options):
    """The text decoder in bf16 of random weights, then in NF4 module by module: NF4, double quantisation."""
    config = AutoConfig.from_pretrained(options.base).get_text_config()
    config.use_cache = False
    config.quantization_config = None
    attention = "eager" if config.model_type in _ONLY_EAGER else "sdpa"
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _in_four_bits(module))
        elif isinstance(getattr(module, _STACKS[0], None), nn.Parameter):
            for stack in _STACKS:
                replace_parameter_4bit(module, stack, compress_statistics=True, quant_type="nf4")
    return model.requires_grad_(requires_grad=False)


def _in_four_bits(linear):
    form = {"compress_statistics": True, "quant_type": "nf4"}
    made = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        device="meta",
        **form,
    )
    made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **form).to(linear.weight.device)
    made.bias = linear.bias
    return made


def adapted(model, names):
    """Whole names of the linear modules that are called so: a stack of experts may be called as a shared one is."""
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit))
    return [name for name, _ in modules if name.rpartition(".")[2] in names]


def main():
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--targets", required=True, help="modules that get an adapter, with commas")
    parser.add_argument("--batch", type=int, default=32, help="examples of a step")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    model = drawn_base(options)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model = get_peft_model(model, adapter(targets=adapted(model, options.targets.split(","))))
    settings = training(
        options,
        per_device_train_batch_size=options.batch,
        optim="adamw_torch_fused",
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length",
        use_liger_kernel=on_gpu,
        liger_kernel_config=_LIGER if on_gpu else None,
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
