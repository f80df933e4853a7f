"""The adapter's README: where it comes from, what it was trained on, how it is loaded; with front matter for hubs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from job.core.recipe import LoraSection, is_hub_id
from job.core.report import SourceLoss, SourceShare
from job.core.report_data import DataReport
from job.core.visible import code_span


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the card says."""

    run_id: str
    base: str
    """A hub id, a folder, or a store's prefix."""
    revision: str
    licence: str | None
    """The base's; None: not known."""
    is_multimodal: bool
    """Whether the base is a model of more than text, of which the adapter is on the text decoder."""
    form: str
    """What its linear layers are, counted."""
    data: DataReport
    lora: LoraSection
    step: int
    """The one whose adapter it is."""
    steps: int
    base_loss: float
    tuned_loss: float
    shares: Sequence[SourceShare] = ()
    """What was taken of each source, where there are several."""
    in_mxfp4: bool = False
    """Whether the base is published with its experts in MXFP4."""
    losses: Sequence[tuple[SourceLoss, SourceLoss]] = ()
    """Of each held-out source, where there are several: base and tuned."""


def adapter_card(card: Card) -> str:
    """README.md, in Markdown."""
    data = card.data
    hashes = "\n".join(
        f"- {code_span(o.uri)} sha256 `{o.sha256}`" for o in (*data.train.objects, *data.validation.objects)
    )
    licence = code_span(card.licence) if card.licence else "not known; look at the base model"
    return f"""---
base_model: {json.dumps(card.base)}
library_name: peft
tags: [lora, qlora]
---
# LoRA adapter for {code_span(card.base)}

Run `{card.run_id}`, step {card.step} of {card.steps}: validation loss
{card.base_loss:.4f} (base) -> {card.tuned_loss:.4f}.

- Base: {code_span(card.base)}, revision {code_span(card.revision)}
- Licence of the base: {licence}. It holds for what is made from the base too.
- Base read as {card.form}; LoRA r {card.lora.r}, alpha {card.lora.alpha:g}

Trained on {data.train.used} examples, judged on {data.validation.used}:
{hashes}
{_sources(card)}
```python
import torch
from peft import PeftModel
{_loading(card)}
```
"""


def _loading(card: Card) -> str:
    """The lines of code that load base and adapter."""
    on_hub = is_hub_id(card.base)
    loaded = card.base if on_hub else "path/to/base"
    auto_class = "AutoModelForImageTextToText" if card.is_multimodal else "AutoModelForCausalLM"
    revision = f", revision={json.dumps(card.revision)}" if on_hub else ""
    if card.in_mxfp4:
        return f"""from transformers import {auto_class}, Mxfp4Config

# Experts are published in MXFP4 and were trained on in NF4, in which transformers has none: here they are in bf16.
bf16 = Mxfp4Config(dequantize=True)
base = {auto_class}.from_pretrained("{loaded}", dtype=torch.bfloat16, quantization_config=bf16{revision})
model = PeftModel.from_pretrained(base, "path/to/this/adapter")"""
    return f"""from transformers import {auto_class}, BitsAndBytesConfig

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
base = {auto_class}.from_pretrained("{loaded}", dtype=torch.bfloat16, quantization_config=nf4{revision})
model = PeftModel.from_pretrained(base, "path/to/this/adapter")
# On some CPUs bitsandbytes refuses sizes that it can compute with; without this they end in an assertion:
# for module in base.modules(): module.support_avx512bf16_for_cpu = False"""


def _sources(card: Card) -> str:
    """A paragraph on each of several sources; else nothing."""
    lines = [
        f"- {code_span(source.name)}: {source.used} examples, {share.share:.1%} of what was drawn"
        for source, share in zip(card.data.train.sources, card.shares, strict=True)
    ]
    judged = [
        f"- {code_span(base.name)}: {base.loss:.4f} (base) -> {tuned.loss:.4f} on {base.examples} held out"
        for base, tuned in card.losses
        if base.loss is not None and tuned.loss is not None
    ]
    named = {"What was drawn": lines, "Validation loss by source": judged}
    return "".join(f"\n{title}:\n" + "\n".join(block) + "\n" for title, block in named.items() if block)
