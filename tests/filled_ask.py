"""What `plan` prints of a scheduler's template, beside the numbers that `plan --json` prints."""

import json
import textwrap
from pathlib import Path

from llama_2_7b import WORK
from report_fixtures import DATA

from job.core.plan.forecast import forecast
from job.core.plan.gpus import gpu_named
from job.core.plan.plan_json import plan_json
from job.render.plan_text import plan_lines

ROOT = Path(__file__).parents[1]
TEMPLATES = sorted(ROOT.glob("*/ask.txt"))
FOUND = (DATA, [], WORK, [forecast(WORK, gpu_named("h100"))])


def ask_lines(*templates):
    """The end of the text: the sentence, and each template as it is filled in."""
    lines = plan_lines(*FOUND, words=(), templates=templates, usd_per_hour=None)
    first = next(number for number, line in enumerate(lines) if line.startswith("ask for:"))
    return lines[first:]


def filled(folder):
    """What is to be pasted, and `ask` of the JSON."""
    _sentence, *lines = ask_lines((ROOT / folder / "ask.txt").read_text(encoding="utf-8"))
    printed = plan_json(*FOUND, usd_per_hour=None).model_dump_json()
    return textwrap.dedent("\n".join(lines)), json.loads(printed)["ask"]
