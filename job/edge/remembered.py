"""Answers that take seconds to compute, kept in the work folder for the next command that asks the same."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from job.core.errors import UsageError
from job.edge.host.outcome import replace_file

_MOST_BYTES = 2**16


def remembered(folder: Path, question: Mapping[str, Any], answer: Callable[[], str]) -> str:
    """The answer, computed where it is not kept; a refusal is an answer as well, and is raised again.

    Args:
        folder: has a file for each question.
        question: all that the answer depends on, as JSON has it.
        answer: computes it.

    Raises:
        UsageError: the answer is a refusal.
    """
    file = folder / f"{sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()[:32]}.json"
    found = _read(file)
    if found is None:
        try:
            found = {"answer": answer(), "refused": False}
        except UsageError as error:
            found = {"answer": str(error), "refused": True}
        with suppress(OSError):  # it is computed again next time
            replace_file(file, json.dumps(found).encode())
    if found["refused"]:
        raise UsageError(found["answer"])
    return str(found["answer"])


def _read(file: Path) -> dict[str, Any] | None:
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(_MOST_BYTES))
    except (OSError, ValueError):
        return None
    known = isinstance(found, dict) and isinstance(found.get("answer"), str) and isinstance(found.get("refused"), bool)
    return found if known else None
