"""How a published adapter is loaded and served, as commands that work when they are pasted."""

import json
import shlex
from urllib.parse import unquote, urlsplit

from job.core.base.servers import VLLM_RANKS, vllm_rank
from job.core.recipe.schema import is_hub_id
from job.core.reports.report import Report
from job.core.visible import code_span, one_line

FOLDER, BASE = "path/to/adapter", "path/to/base"
"""Stand for where the adapter's folder was brought, and a base that others do not find by its name."""
_BUCKET, _FILE = "s3://", "file:///"
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


def bring_line(uri: str, folder: str) -> str | None:
    """The command that copies a bucket's folder to this machine; None: it is in no bucket."""
    return shlex.join(map(one_line, ["aws", "s3", "cp", "--recursive", uri, folder])) if _is_in_bucket(uri) else None


def bring_base_line(report: Report) -> str | None:
    """The same of a base in a bucket, to where the other lines look for it."""
    return bring_line(report.model.base, BASE)


def peft_lines(report: Report, folder: str = FOLDER) -> str:
    """Python that loads base and adapter as they were judged: in 4 bits, where transformers can do that."""
    base, revision = _base(report)
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


def vllm_line(report: Report, folder: str = FOLDER) -> str | None:
    """The command that serves the adapter beside its base; None: vLLM is known to refuse it."""
    rank = vllm_rank(_rank(report))
    if rank is None or any(each.startswith("vLLM ") for each in report.adapter.refused_by):
        return None
    base, revision = _base(report)
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


def remarks(report: Report) -> list[str]:
    """What has to be known before the lines are pasted, in Markdown."""
    said = []
    base, _ = _base(report)
    if base == BASE and not _is_in_bucket(report.model.base):
        said.append(
            f"`{BASE}` stands for the folder that was called {code_span(report.model.base)} where the run was started."
        )
    if not report.model.in_mxfp4:
        said.append(
            "On some CPUs bitsandbytes refuses sizes that it can compute with; there, before anything is asked: "
            "`for module in base.modules(): module.support_avx512bf16_for_cpu = False`."
        )
    return said


def _base(report: Report) -> tuple[str, str | None]:
    """The base as it is found by pasted lines, and its commit.

    A bucket is read by neither library, and a relative folder is found from one place alone: both are where they were
    brought.
    """
    base = report.model.base
    if is_hub_id(base):
        return base, report.model.revision
    folder = unquote(urlsplit(base).path) if base.startswith(_FILE) else base
    return (folder if folder.startswith("/") else BASE), None


def _is_in_bucket(uri: str) -> bool:
    return uri.startswith(_BUCKET)


def _tokenizer(report: Report, base: str, at: str, folder: str) -> str:
    return json.dumps(folder) if "tokenizer_config.json" in report.adapter.files else f"{json.dumps(base)}{at}"


def _rank(report: Report) -> int:
    lora = report.recipe.get("lora")
    rank = lora.get("r") if isinstance(lora, dict) else None
    return rank if isinstance(rank, int) else VLLM_RANKS[-1]
