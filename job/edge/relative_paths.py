"""Relative paths in messages: whoever reads a log or an outcome elsewhere learns relative to what."""

from collections.abc import Iterable
from pathlib import Path


def located(name: str | Path) -> str:
    """A path as it was given, with the folder that it counts from if it is relative; a URI as it is."""
    return f"{name}{relative_note([str(name)])}"


def relative_note(names: Iterable[str]) -> str:
    """` (relative to /folder, where the job was started)`; empty if no name is a relative path."""
    if all("://" in name or Path(name).is_absolute() for name in names):
        return ""
    return f" (relative to {Path.cwd()}, where the job was started)"
