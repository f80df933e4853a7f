"""A plain transformers + peft loop: padded batches, Hugging Face's own attention and cross-entropy, torch's AdamW.

It shares no line with the job, so that the job can be judged by it.
"""

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, get_scheduler


def load_base(folder, device="cpu"):
    """NF4, double quantisation, bf16 compute."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantised, dtype=torch.bfloat16, device_map={"": device}
    )


def losses(model, batch):
    """Loss of each target, in nats: [N] fp32. `batch` has (token ids, place of the first target) of each example."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch], device=model.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch], device=model.device)
    labels = [[-100] * start + ids[start:] + [-100] * (width - len(ids)) for ids, start in batch]
    labels = torch.tensor(labels, device=model.device)[:, 1:].flatten()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), labels, reduction="none")[labels >= 0]


def train(model, batches, *, steps, learning_rate, warmup_steps, max_grad_norm):
    """One step a batch, the rate falling in a line; yields the loss of each."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, warmup_steps, steps)
    model.train()
    for batch in batches:
        loss = losses(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield float(loss.detach())
