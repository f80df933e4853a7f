"""The name that somebody meant who wrote another one."""

from collections.abc import Iterable
from difflib import get_close_matches


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like this one, whatever its case; None: none does."""
    by_lower = {each.lower(): each for each in known}
    found = get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message: `; did you mean r?`, or nothing where no known name looks like it."""
    found = closest(name, known)
    return "" if found is None else f"; did you mean {found}?"
