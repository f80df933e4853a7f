"""Text by strangers on its way to a terminal or into Markdown: what it holds is seen, never obeyed."""

import re


def visible(text: str) -> str:
    """The text with every character that is not printed written as its escape; lines and tabs stay.

    Terminals obey control characters, and some characters turn the order of what follows.
    """
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)


def one_line(text: str) -> str:
    """The same, and it begins no line: a break in it is written as its escape."""
    return visible(text).replace("\n", r"\n")


def code_span(text: str) -> str:
    """The text as code within a line of Markdown, whatever it holds (CommonMark 0.31, section 6.1)."""
    line = visible(" ".join(text.split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{room}{line}{room}{fence}"
