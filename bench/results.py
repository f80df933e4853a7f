"""Tables and sections of RESULTS.md; a section that is measured again is replaced."""

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
_NAMED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def table(header, rows):
    """Markdown: the first column is text, the others are numbers on the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def write_section(path, name, text):
    """Replace the section of this name, or put it at the end of the file."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    content = path.read_text(encoding="utf-8") if path.exists() else ""
    block = f"{begin}\n\n{text.strip()}\n\n{end}"
    if begin in content:
        pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
        content = re.sub(pattern, lambda _: block, content, flags=re.DOTALL)
    else:
        content = f"{content.rstrip()}\n\n{block}\n".lstrip()
    path.write_text(content, encoding="utf-8")


def device_and_versions(others=()):
    """One line: what it was measured on, and with what."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}; Python {platform.python_version()}, " + ", ".join(versions([*_NAMED, *others])) + "."


def versions(names):
    """`name version` of each that is installed."""
    for name in names:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
