"""How a published adapter is loaded and served, as commands that work when they are pasted."""

import json
import shlex

from job.core.base.servers import VLLM_RANKS, vllm_rank
from job.core.recipe.schema import is_hub_id
from job.core.reports.report import Report
from job.core.visible import one_line

FOLDER, BASE = "path/to/adapter", "path/to/base"
"""Stand for where the adapter's folder was brought, and a base that is not on the hub."""
_IN_NF4 = (
    "BitsAndBytesConfig",
    "nf4",
    """nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)""",
)
_IN_MXFP4 = (
    "Mxfp4Config",
    "bf16",
    """# Experts are published in MXFP4 and were trained in NF4, in which transformers has none: here they are in bf16.
bf16 = Mxfp4Config(dequantize=True)""",
)
"""The class that reads a base's weights, our name for one of it, and the lines that make that."""


def peft_lines(report: Report, folder: str = FOLDER, base: str = BASE) -> str:
    """Python that loads base and adapter as they were judged: in 4 bits, where transformers can do that."""
    base, revision = _base(report, base)
    auto_class = "AutoModelForImageTextToText" if report.model.left_out is not None else "AutoModelForCausalLM"
    at = "" if revision is None else f", revision={json.dumps(revision)}"
    config, form, lines = _IN_MXFP4 if report.model.in_mxfp4 else _IN_NF4
    return f"""import torch
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer, {config}

{lines}
base = {auto_class}.from_pretrained({json.dumps(base)}, dtype=torch.bfloat16, quantization_config={form}{at})
model = PeftModel.from_pretrained(base, {json.dumps(folder)})
tokenizer = AutoTokenizer.from_pretrained({_tokenizer(report, base, at, folder)})"""


def vllm_line(report: Report, folder: str = FOLDER, base: str = BASE) -> str | None:
    """The command that serves the adapter beside its base; None: vLLM is known to refuse it."""
    rank = vllm_rank(_rank(report))
    if rank is None or any(each.startswith("vLLM ") for each in report.adapter.refused_by):
        return None
    base, revision = _base(report, base)
    words = ["vllm", "serve", base]
    words += [] if revision is None else ["--revision", revision]
    words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"tuned={folder}"]
    if "chat_template.jinja" in report.adapter.files:
        words += ["--chat-template", f"{folder}/chat_template.jinja"]
    if "generation_config.json" in report.adapter.files:
        words += ["--generation-config", folder]
    return shlex.join(map(one_line, words))


def asked_as(report: Report) -> str:
    """Through which door of a server the model is asked as it was taught."""
    data = report.recipe.get("data")
    if isinstance(data, dict) and data.get("chat") is not None:
        return "It was taught on chats: ask it as `model: tuned` at /v1/chat/completions."
    return (
        "It was taught on texts and not on chats: ask it as `model: tuned` at /v1/completions, with a prompt as the "
        "recipe's template makes it."
    )


def _base(report: Report, elsewhere: str) -> tuple[str, str | None]:
    """The base as others name it, and its commit; what is no hub id is where they have brought it."""
    if is_hub_id(report.model.base):
        return report.model.base, report.model.revision
    return elsewhere, None


def _tokenizer(report: Report, base: str, at: str, folder: str) -> str:
    return json.dumps(folder) if "tokenizer_config.json" in report.adapter.files else f"{json.dumps(base)}{at}"


def _rank(report: Report) -> int:
    lora = report.recipe.get("lora")
    rank = lora.get("r") if isinstance(lora, dict) else None
    return rank if isinstance(rank, int) else VLLM_RANKS[-1]
