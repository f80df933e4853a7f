"""Shell patterns on keys and URIs: `*` and `?` stay in one folder, `**` goes any depth; hidden names need their dot."""

import re
from collections.abc import Callable, Collection

_WILD = re.compile(r"[*?[]")
_VISIBLE = r"(?!\.)"


def has_glob(path: str) -> bool:
    """Whether a path contains a wildcard."""
    return _WILD.search(path) is not None


def literal_prefix(path: str, *, literal: Collection[int] = ()) -> str:
    """What every match begins with; arguments as of `matcher`."""
    parts = path.split("/")
    for number, part in enumerate(parts):
        wild = _WILD.search(part)
        if wild is not None and number not in literal:
            return "/".join([*parts[:number], part[: wild.start()]])
    return path


def wild_parts(path: str) -> list[int]:
    """The places of the components with wildcards; `**` is the name of nothing."""
    return [number for number, part in enumerate(path.split("/")) if _WILD.search(part) and part != "**"]


def matcher(path: str, *, literal: Collection[int] = (), perhaps: bool = False) -> Callable[[str], bool]:
    """Whether a key or URI matches a glob, or lies below a prefix that is empty or ends in "/".

    Args:
        path: the glob or the prefix.
        literal: places of components whose wildcards are letters.
        perhaps: whether the others may be either.
    """
    if path.endswith("/") or not path:
        path += "**"
    last = path.count("/")
    pattern = ""
    for number, part in enumerate(path.split("/")):
        written = re.escape(part) + ("" if number == last else "/")
        wild = _folder(part, last=number == last)
        pattern += written if number in literal else f"(?:{wild}|{written})" if perhaps else wild
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
