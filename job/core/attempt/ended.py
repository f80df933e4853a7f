"""What is kept of an ending when machine, container and log are gone: a few facts, the same for people and scripts."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from job.core.errors import Again
from job.core.visible import visible

LONGEST_REASON = 2000
"""Characters: enough of a recipe with fifty mistakes."""
WITHOUT_A_WORD = "ended without a word: killed, or its node was lost"
"""What is known of an attempt that left no record of its end."""


class EndedPromotion(BaseModel):
    """What came of a run on its channel."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    channel: str
    outcome: str
    """`promoted`, `refused`, or `lost`: what it was compared with was in use no longer."""
    replaced_by: str | None = None
    """What is in use in its place, where it was promoted and replaced before this was written."""
    verdict: str
    """`better`, `not better` or `cannot tell`."""
    challenger: str
    champion: str
    why: str
    """One sentence."""
    report: str
    """Where the report stands."""
    page: str | None = None
    """Where its page does; None: an earlier version of the job wrote this."""
    also: list[str] = Field(default_factory=list)
    """What came of other runs that waited or had lost their swap: a sentence each."""


class Ended(BaseModel):
    """How one process that was to carry a run has ended."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    version: Literal[1] = 1
    time: str
    """When it ended; of one that ended without a word, when that was found."""
    code: int | None
    """The exit code; None: it ended without a word, and the next attempt found it so."""
    again: str
    """Whether starting the same job again helps, in the words of the table of exit codes."""
    reason: str
    action: str
    """What a person does about it."""
    host: str
    recipe: str | None = None
    """The file's name."""
    run_uri: str | None = None
    """None: no run was begun yet."""
    attempt: int | None = None
    """Its number in the run; None: it had none yet."""
    phase: str | None = None
    step: int | None = None
    last_committed_step: int | None = None
    signal: str | None = None
    """What asked it to stop."""
    job_version: str = ""
    promotion: EndedPromotion | None = None
    """None: the recipe names no channel, or it was not decided."""
    late: list[str] | None = None
    """Files that were left out as they were not whole yet, and why; None: there was none."""


def ended_without_a_word(attempt: Mapping[str, Any], *, run_uri: str, found: str, newest_step: int | None) -> Ended:
    """The ending of an attempt that left none, as its successor finds it.

    Args:
        attempt: its record.
        run_uri: of the run.
        found: the time now.
        newest_step: the newest committed step.
    """
    host = attempt.get("host")
    return Ended(
        time=found,
        code=None,
        again=Again.COUNTED.value,
        reason=f"{WITHOUT_A_WORD}; the next attempt found it so, and goes on from the last committed step",
        action="nothing; where it happens again, look at the memory that the job is given and at the node",
        host=host if isinstance(host, str) else "",
        run_uri=run_uri,
        attempt=attempt["number"],
        last_committed_step=newest_step,
    )


def one_line(text: str, *, at_most: int) -> str:
    """A text of strangers as one line of a bounded length."""
    line = " ".join(visible(text).split())
    return line if len(line) <= at_most else line[: at_most - 1] + "…"
