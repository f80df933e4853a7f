"""Shell patterns on keys and URIs: `*` and `?` stay in one folder, `**` goes any depth; hidden names need their dot."""

import re
from collections.abc import Callable

_WILD = re.compile(r"[*?[]")
_VISIBLE = r"(?!\.)"


def has_glob(path: str) -> bool:
    """Whether a path contains a wildcard."""
    return _WILD.search(path) is not None


def literal_prefix(path: str) -> str:
    """What every match begins with."""
    wild = _WILD.search(path)
    return path if wild is None else path[: wild.start()]


def matcher(path: str) -> Callable[[str], bool]:
    """Whether a key or URI matches a glob, or lies below a prefix that is empty or ends in "/"."""
    if path.endswith("/") or not path:
        path += "**"
    last = path.count("/")
    pattern = "".join(_folder(part, last=number == last) for number, part in enumerate(path.split("/")))
    compiled = re.compile(pattern, re.DOTALL)
    return lambda key: compiled.fullmatch(key) is not None


def _folder(part: str, *, last: bool) -> str:
    """The regular expression for one component, with the "/" that follows it."""
    if part == "**":
        return rf"(?:{_VISIBLE}[^/]+/)*" + (rf"{_VISIBLE}[^/]+" if last else "")
    visible = _VISIBLE if _WILD.match(part) else ""
    return visible + _letters(part) + ("" if last else "/")


def _letters(part: str) -> str:
    """The regular expression for the letters of one component."""
    written, at = "", 0
    while at < len(part):
        letter, at = part[at], at + 1
        if letter == "*":
            written += "[^/]*"
        elif letter == "?":
            written += "[^/]"
        elif letter == "[" and (end := part.find("]", at + 1 + (part[at : at + 1] == "!"))) != -1:
            chosen = part[at:end].replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
            written += "[" + ("^/" + chosen[1:] if chosen.startswith("!") else chosen) + "]"
            at = end + 1
        else:
            written += re.escape(letter)
    return written
