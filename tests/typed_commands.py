"""The commands that a page shows, as somebody types them."""

import re
import textwrap

_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str = "") -> list[str]:
    """What stands between fences, also below a bullet."""
    return [textwrap.dedent(text) for _, found, text in _FENCED.findall(page) if found == language]


def within_sentences(page: str, *programs: str) -> list[str]:
    """Each command in backticks that begins with one of the programs; a line break within one is a space."""
    starts = "|".join(re.escape(program) for program in programs)
    found = re.findall(rf"`((?:{starts})[^`]*)`", _FENCED.sub("", page))
    return list(dict.fromkeys(re.sub(r"\s+", " ", each) for each in found))
